"""Bad inputs and faults, by distinct mechanism: what a person reads, and the exit code."""
