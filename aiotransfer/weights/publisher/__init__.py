"""A trainer rank: how all of them agree on a version, and how its bytes are written."""
