"""The leaf every room may import: keyed random numbers, file writing, errors and logging."""
