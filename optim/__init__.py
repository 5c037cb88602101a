"""The optimizer's side of training: parameter groups, schedules, losses, the update, EMA, batch
arithmetic."""
