"""Decisions: pure, without await, clock, I/O or logging."""
