"""Which providers an engine runs: what this machine has, what was asked for, and why the rest is missing."""
