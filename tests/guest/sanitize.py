"""The tests of the guest under the address and undefined-behaviour sanitizers.

    python -m tests.guest.sanitize [--seconds 1500] [tests/guest/test_verbs.py ...]

As `tests.sanitize`: a copy of the tree built with the sanitizers, canaries that must be caught first, here and once more in the
guest, and one report of any process fails the run. What the guest writes is gone with it: it prints the reports before it goes.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.sanitize import SANITIZERS, Tree

MARK = "reports of the sanitizer:"
SLOWNESS = "16"


def inside(tree: Tree, command: list[str], seconds: float) -> tuple[int, str]:
    """Run in the guest: the exit status, and what processes reported."""
    names = ("LD_PRELOAD", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "CANARY", *tree.sanitizer.environ)
    environ = [f"{name}={tree.environ[name]}" for name in names]
    words = shlex.join(["env", *environ, f"TESTS_SLOWNESS={SLOWNESS}", *command])
    script = f"{words}; code=$?; echo '{MARK}'; cat {shlex.quote(str(tree.logs))}/* 2>/dev/null; exit $code"
    guest = [sys.executable, "-m", "tests.guest.run", "--seconds", f"{seconds:g}", "--", "bash", "-c", script]
    process = subprocess.Popen(guest, cwd=tree.where, stdout=subprocess.PIPE, text=True, errors="replace")
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    code = process.wait()
    text = "".join(lines)
    assert MARK in text, "the guest ended before its command did"
    return code, text.partition(MARK)[2].strip()


def main() -> int:
    """Returns 0 when the canaries were caught and nothing else was found."""
    parser = argparse.ArgumentParser(prog="tests.guest.sanitize")
    parser.add_argument("--seconds", type=float, default=1500)
    parser.add_argument("tests", nargs="*", default=["tests/guest"])
    arguments = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sanitize-") as folder:
        tree = Tree(Path(folder), SANITIZERS["address"])
        if tree.canaries():
            print("the canaries were not caught: a run would prove nothing")
            return 1
        code, words = tree.sanitizer.canaries["overflow in the extension"]
        status, report = inside(tree, [sys.executable, "-c", code], 120)
        if status == 0 or words not in report:
            print("the canary was not caught in the guest")
            return 1
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "timeout=600", *arguments.tests]
        status, report = inside(tree, pytest, arguments.seconds)
    found = [name for name, bad in (("tests failed", status), ("reports", report)) if bad]
    print(f"address sanitizer in the guest: {', '.join(found) or 'nothing found'}, {time.monotonic() - begun:.0f} s")
    return len(found)


if __name__ == "__main__":
    sys.exit(main())
