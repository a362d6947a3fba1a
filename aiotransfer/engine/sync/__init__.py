"""Waiting for others: counters of immediates, barriers, watched words."""
