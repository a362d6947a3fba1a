"""Bytes on their way: submitted, in flight, ended."""
