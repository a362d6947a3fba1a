"""Descriptors are closed in threads of their own: an interpreter that ends meanwhile ends well, however late those begin."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

SLOW = """
import sys, time
class Slow:  # the interpreter is busy with its end while threads begin
    def __init__(self, sleep): self.sleep = sleep
    def __del__(self): self.sleep(1.0)
sys.slow = Slow(time.sleep)
"""

AT_THE_END = """
import os
from aiotransfer.providers import elsewhere
for _ in range(20):
    elsewhere.close_elsewhere([os.pipe()[0]])
"""

IN_THE_VERY_LAST_WORDS = """
import atexit, os
from aiotransfer.providers import elsewhere
class Thing:
    def __del__(self): elsewhere.close_elsewhere([os.pipe()[0]])
things = [Thing()]
elsewhere.close_elsewhere([os.pipe()[0]])
"""

ENGINES = """
import asyncio, uvloop
import aiotransfer as at
async def main():
    async with at.open_engine() as engine:
        other = await at.open_engine()
        peer = await engine.connect(other.address)
        await engine.write(engine.allocate(1 << 20), other.allocate(1 << 20).descriptor)
        await other.aclose()
uvloop.run(main())
"""

INTERRUPTED = """
import asyncio, os, signal, threading, uvloop
import aiotransfer as at
signal.signal(signal.SIGINT, signal.default_int_handler)
async def main():
    async with at.open_engine() as engine:
        other = await at.open_engine()
        peer = await engine.connect(other.address)
        threading.Timer(0.0, os.kill, (os.getpid(), signal.SIGINT)).start()
        try: await peer.closed()
        finally: await other.aclose()
with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
    try: runner.run(main())
    except KeyboardInterrupt: pass
"""


@pytest.fixture(scope="module")
def late(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that makes every thread of a process begin late."""
    library = tmp_path_factory.mktemp("late") / "late.so"
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]
    subprocess.run(["cc", *flags, str(HERE / "late_threads.c"), "-o", str(library), "-ldl"], check=True)
    return library


@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="the sanitizers' own libraries stand there")
@pytest.mark.skipif(not sys.platform.startswith("linux") or shutil.which("cc") is None, reason="needs Linux and a compiler")
@pytest.mark.parametrize("ms", [0, 500])
@pytest.mark.parametrize("script", [AT_THE_END, IN_THE_VERY_LAST_WORDS, ENGINES, INTERRUPTED])
def test_an_interpreter_that_ends_before_its_threads_have_begun_ends_well(script: str, ms: int, late: Path) -> None:
    """Freed memory is overwritten under `-X dev`: a thread that uses it then crashes, and does not only by chance."""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", SLOW + script], cwd=ROOT, capture_output=True, text=True, timeout=60,
        env={**os.environ, "LD_PRELOAD": str(late), "LATE_MS": str(ms)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Fatal" not in done.stderr
