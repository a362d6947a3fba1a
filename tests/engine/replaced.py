"""A peer whose program is replaced by another one (exec) that has other memory at the same address. See test_replaced.py."""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
import time

import numpy as np
import numpy.typing as npt

ADDRESS, NBYTES, SECONDS = 0x600000000000, 64 << 20, 2.0


def fixed() -> npt.NDArray[np.uint8]:
    """Memory at one address in every program."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    assert libc.mmap(ADDRESS, NBYTES, 3, 0x32, -1, 0) == ADDRESS
    return np.frombuffer((ctypes.c_uint8 * NBYTES).from_address(ADDRESS), np.uint8)


async def first_program(address: str) -> None:
    import aiotransfer as at

    engine = await at.open_engine()
    memory = fixed()
    engine.publish("memory", engine.register((ADDRESS, NBYTES, "cpu")), access="both")
    await engine.connect(address)
    while not memory[-1]:
        await asyncio.sleep(0.001)
    os.execv(sys.executable, [sys.executable, __file__, "second"])


def second_program() -> None:
    memory = fixed()
    print("replaced", flush=True)
    time.sleep(SECONDS)
    print(int(np.count_nonzero(memory)), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "second":
        second_program()
    else:
        asyncio.run(first_program(sys.argv[1]))
