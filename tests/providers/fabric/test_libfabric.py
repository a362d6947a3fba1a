"""What loading libfabric must not do to the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from aiotransfer.providers.fabric import libfabric

CODE = """
from aiotransfer.providers.fabric import libfabric
def caught():
    with open("/proc/self/status") as lines:
        mask = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt"))
    return mask & 0x7FFFFFFF  # less what the C library keeps for itself
before = caught()
libfabric.load()
print(before == caught())
"""


def test_loading_it_takes_no_signal_away_from_the_program() -> None:
    if (reason := libfabric.missing()) is not None:
        pytest.skip(reason)
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
