"""Tensors between two actors of one host: by aiotransfer, by Ray's object store, by gloo; in one run, in turns.

    python tests/benchmarks/ray_objects.py --rounds 9 --most 256MiB

What is timed is what the driver sees: a task of the sending actor returns a tensor that it has, a task of the receiving actor
is given it, reads one byte of every page, and answers. Each figure is the median over the rounds, in which the ways take turns.
"object store": the same tensor returned without a tensor transport. "array": as an array of NumPy, which the receiver reads where
it lies in the object store (read-only), without a copy of its own.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import ray
import torch
from ray.experimental.collective import create_collective_group

import aiotransfer as at
from aiotransfer.integrations import ray as aioray

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
SIZES = (KIB, 64 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB, GIB)
WAYS = ("aiotransfer", "object store", "array", "gloo")
PAGE = 4096
TIMEOUT = 300.0
aioray.register()  # before the class that names it


class Actor:
    """Makes tensors of one size, and takes them."""

    def prepare(self, nbytes: int) -> None:
        """Make the tensor that is sent from now on."""
        torch.set_num_threads(1)
        self.tensor = torch.full((nbytes,), 7, dtype=torch.uint8)

    @ray.method(tensor_transport="aiotransfer")
    def aiotransfer(self) -> Any:
        """The tensor; it stays here until it is asked for."""
        return self.tensor

    @ray.method(tensor_transport="gloo")
    def gloo(self) -> Any:
        """The tensor; it stays here until it is sent."""
        return self.tensor

    def object_store(self) -> Any:
        """The tensor, which goes into the object store."""
        return self.tensor

    def array(self) -> Any:
        """The tensor as an array, which goes into the object store."""
        return self.tensor.numpy()

    def take(self, given: Any) -> int:
        """Read a byte of each page."""
        return int(given[::PAGE].sum())

    def ways(self) -> dict[str, str]:
        """How the transport of this process reaches others."""
        return aioray.statistics().ways


def measure(sender: Any, receiver: Any, way: str, nbytes: int) -> float:
    """Seconds from the call of the sender's task to the answer of the receiver's."""
    begin = time.perf_counter()
    made = getattr(sender, way.replace(" ", "_")).remote()
    found = ray.get(receiver.take.remote(made), timeout=TIMEOUT)
    took = time.perf_counter() - begin
    if found != 7 * -(-nbytes // PAGE):
        raise SystemExit(f"{way}, {nbytes} bytes: WRONG bytes arrived")
    return took


def rounds(sender: Any, receiver: Any, nbytes: int, count: int) -> dict[str, float]:
    """The median of each way."""
    ray.get(sender.prepare.remote(nbytes), timeout=TIMEOUT)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(count + 1):
        for way in WAYS:
            took = measure(sender, receiver, way, nbytes)
            if number:  # the first is a warm-up
                times[way].append(took)
    return {way: statistics.median(found) for way, found in times.items()}


def size(text: str) -> int:
    """Bytes of `64KiB`, `16MiB`, `1GiB`."""
    for unit, factor in (("KiB", KIB), ("MiB", MIB), ("GiB", GIB)):
        if text.endswith(unit):
            return int(text[: -len(unit)]) * factor
    return int(text)


def shown(nbytes: int) -> str:
    """The same as text."""
    for unit, factor in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if nbytes >= factor:
            return f"{nbytes // factor} {unit}"
    return f"{nbytes} B"


def cpu() -> str:
    """What the kernel calls the processor."""
    with open("/proc/cpuinfo") as lines:
        return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def report(count: int, most: int) -> None:
    """Print the table, size by size."""
    actor = ray.remote(num_cpus=0)(Actor)
    sender, receiver = actor.remote(), actor.remote()
    create_collective_group([sender, receiver], backend="gloo")
    print(f"{cpu()}, {os.cpu_count()} cores, Linux {platform.release()}; Ray {ray.__version__}, torch {torch.__version__}, "
          f"NumPy {np.__version__}, aiotransfer {at.__version__}; load {os.getloadavg()[0]:.1f} at the beginning")  # fmt: skip
    print(f"median of {count} rounds, in ms (GB/s for aiotransfer)\n")
    print("| size | aiotransfer | GB/s | object store | array | gloo | store / aiotransfer |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for nbytes in SIZES:
        if nbytes > most:
            break
        found = rounds(sender, receiver, nbytes, count if nbytes < GIB else min(count, 5))
        ours, store, array, gloo = (found[way] for way in WAYS)
        print(f"| {shown(nbytes)} | {ours * 1e3:.1f} | {nbytes / ours / 1e9:.2f} | {store * 1e3:.1f} | {array * 1e3:.1f} | "
              f"{gloo * 1e3:.1f} | {store / ours:.1f} |", flush=True)  # fmt: skip
    print(f"\nthe receiver reached the sender by {ray.get(receiver.ways.remote())}")


def main() -> int:
    """A Ray of this machine alone, gone afterwards with its files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="how often each way is measured for each size (default 9)")
    parser.add_argument("--most", type=size, default=GIB, help="the largest size, such as 256MiB (default 1GiB)")
    given = parser.parse_args()
    directory = tempfile.mkdtemp(prefix="ray")  # short: Ray puts sockets beneath it
    ray.init(
        num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", _temp_dir=directory, log_to_driver=False,
        configure_logging=False, object_store_memory=4 * GIB,
    )  # fmt: skip
    try:
        report(given.rounds, given.most)
    finally:
        ray.shutdown()
        shutil.rmtree(directory, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
