"""A pid that names another program than the one that shared its memory."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import aiotransfer as at

from .replaced import NBYTES

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="foreign memory is reached on Linux"),
]


def write_until_it_is_over(
    posts: list[Callable[[], at.ThreadTransfer]], process: subprocess.Popen[str], good: Callable[[], bool]
) -> list[str]:
    """Go on while the new program looks at its memory; what happened, and at the end what it has seen."""
    happened = []
    while process.poll() is None:
        for post in posts:
            try:
                post().wait(5)
                happened.append("landed" if good() else "another program's bytes were read")
            except at.TransferError as error:
                happened.append(type(error).__name__)
    return happened


@pytest.mark.parametrize("nbytes", [64, 64 << 10, 1 << 20, NBYTES, 0], ids=["64 B", "64 KiB", "1 MiB", "64 MiB", "pages"])
async def test_bytes_for_a_program_do_not_land_in_the_next_one_of_its_process(nbytes: int) -> None:
    """What is read back is of the first program, too, or an error."""
    async with at.open_engine(listen="127.0.0.1:0") as engine:
        command = [sys.executable, str(Path(__file__).with_name("replaced.py")), str(engine.address)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            peer = await asyncio.wait_for(anext(engine.arrivals()), 30)
            there, here = await peer.lookup("memory"), engine.register(np.full(NBYTES, 7, np.uint8))
            pages = np.arange(2048)
            handle, array = engine.from_thread(), np.full(max(nbytes, 1), 7, np.uint8)
            back = engine.register(array)
            await engine.write(here, there)
            posts: list[Callable[[], at.ThreadTransfer]] = [
                lambda: handle.write(here[:nbytes], there[:nbytes]), lambda: handle.read(there[:nbytes], back),
            ] if nbytes else [lambda: handle.write_pages(here, pages, there, pages, page_bytes=4096)]  # fmt: skip
            # Here, so that this loop does not notice what becomes of the peer.
            happened = write_until_it_is_over(posts, process, lambda: bool((array == 7).all()))
            assert process.stdout is not None
            assert process.stdout.read().split() == ["replaced", "0"]
            assert happened[-1] == "PeerLostError"
            assert set(happened) <= {"landed", "PeerLostError"}
