"""What `python -m aiotransfer bench` runs: the cases, each beside its limit in the same run."""
