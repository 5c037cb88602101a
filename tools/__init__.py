"""A user's other commands: python -m tools.NAME."""
