"""`key`: a random key for engines of several hosts or users:
`export AIOTRANSFER_KEY=$(python -m aiotransfer key)`."""

from __future__ import annotations

import argparse

from aiotransfer.control.key import generate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare nothing: this command has no options."""


def run(args: argparse.Namespace) -> int:
    """Print a new random key; the exit status."""
    print(generate())
    return 0
