"""Ours beside what else moves memory between processes, turn by turn in one run. `make rivals`, then `make bench-rivals`."""
