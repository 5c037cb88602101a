"""How processes start, agree, stop and fail: process groups, signals, the watchdog and Slurm."""
