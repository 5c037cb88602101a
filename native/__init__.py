"""Optional fast paths for CPUs."""
