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


def write_until_it_is_over(posts: list[Callable[[], at.ThreadTransfer]], process: subprocess.Popen[str]) -> list[str]:
    """Go on while the new program looks at its memory; what happened, and at the end what it has seen."""
    happened = []
    while process.poll() is None:
        for post in posts:
            try:
                post().wait(5)
                happened.append("landed")
            except at.TransferError as error:
                happened.append(type(error).__name__)
    return happened


async def test_bytes_for_a_program_do_not_land_in_the_next_one_of_its_process() -> None:
    async with at.open_engine(listen="127.0.0.1:0") as engine:
        command = [sys.executable, str(Path(__file__).with_name("replaced.py")), str(engine.address)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            peer = await asyncio.wait_for(anext(engine.arrivals()), 30)
            there, here = await peer.lookup("memory"), engine.register(np.full(NBYTES, 7, np.uint8))
            pages = np.arange(NBYTES >> 12)
            handle = engine.from_thread()
            await engine.write(here[:64], there[:64])
            posts: list[Callable[[], at.ThreadTransfer]] = [
                lambda: handle.write(here[:64], there[:64]),
                lambda: handle.write(here[: 128 << 10], there[: 128 << 10]),
                lambda: handle.write(here, there),
                lambda: handle.write_pages(here, pages, there, pages, page_bytes=4096),
            ]
            happened = write_until_it_is_over(posts, process)  # here, so that this loop does not notice what becomes of the peer
            assert process.stdout is not None
            assert process.stdout.read().split() == ["replaced", "0"]
            assert happened[-1] == "PeerLostError"
