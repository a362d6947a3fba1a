"""The command line: `python -m aiotransfer hello | demo | doctor | ping | key | bench | weights`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

COMMANDS = {
    "hello": "two processes: writes, pages, counters, speed beside memcpy, a killed peer",
    "demo": "a language model whose KV cache crosses from a prefill to a decode process",
    "doctor": "what this machine offers, what is missing and what to do",
    "ping": "latency and bandwidth to an engine by each way to it, and why the others are none",
    "key": "a new random key for AIOTRANSFER_KEY, which cannot be guessed",
    "bench": "bandwidth, rates, latency and idle CPU, each beside its limit",
    "weights": "the plan of a large model's update, from its shapes alone: balance, bytes, predicted times",
}
FOLDERS = {"demo", "doctor"}  # commands of more than one file: theirs is `command.py`


def _command(name: str) -> ModuleType:
    """The module of a command, imported only when it is asked for."""
    return importlib.import_module(f"aiotransfer.cli.{name}.command" if name in FOLDERS else f"aiotransfer.cli.{name}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="aiotransfer", description="One-sided memory transfers behind await.")
    commands = parser.add_subparsers(dest="command")
    for name, text in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text)
        if name in arguments[:1]:
            _command(name).add_arguments(sub)
    args = parser.parse_args(arguments)
    if args.command is None:
        parser.print_help()
        return 2
    command = _command(args.command)
    try:
        return int(command.run(args))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141
