"""`key`: a random key for engines of several hosts or users: `export AIOTRANSFER_KEY=$(python -m aiotransfer key)`."""

from __future__ import annotations

import argparse

from aiotransfer.control.key import generate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are no options."""


def run(args: argparse.Namespace) -> int:
    """Print one."""
    print(generate())
    return 0
