"""A run's life: options, checkpoints, records, results, and the checks before it starts."""
