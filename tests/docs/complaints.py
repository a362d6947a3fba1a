"""What a program of the documentation complained about, run with -X dev."""

from __future__ import annotations


def complaints(stderr: str) -> str:
    """Without what asyncio's debug mode says of a busy machine: that something took more than 0.1 s."""
    return "".join(line for line in stderr.splitlines(keepends=True) if not line.startswith("Executing <"))
