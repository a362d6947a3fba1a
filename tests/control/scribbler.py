"""Writes random words into a shared channel, from a process of its own: `scribbler.py FD SEED SECONDS OFFSET:BYTES...`."""

from __future__ import annotations

import mmap
import os
import random
import sys
import time


def main() -> None:
    fd, seed, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    places = [tuple(map(int, place.split(":"))) for place in sys.argv[5:]]
    bell = int(sys.argv[4])
    memory = mmap.mmap(fd, os.fstat(fd).st_size)
    rng = random.Random(seed)
    values = (0, 1, 2, 1 << 47, 1 << 48, (1 << 64) - 1, 4, 6)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(200):
            offset, nbytes = rng.choice(places)
            at = offset + rng.randrange(nbytes // 4) * 4
            word = rng.choice(values) if rng.random() < 0.5 else rng.getrandbits(64)
            size = min(8, offset + nbytes - at)
            memory[at : at + size] = word.to_bytes(8, "little")[:size]
        if bell >= 0:
            os.write(bell, bytes(8))
        time.sleep(0)


if __name__ == "__main__":
    main()
