"""Two actors of a Ray of this machine alone: one reads tensors from the memory of the other, by the transport
`aiotransfer`.

    python -m aiotransfer.integrations.ray
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from typing import Any

from aiotransfer.errors import ConfigurationError
from aiotransfer.integrations import ray as aioray

SIZES = (1 << 10, 1 << 20, 64 << 20)
ROUNDS = 5
SECONDS = 120.0
PRIME = 251  # no power of two: misplaced bytes are seen


def _actor() -> Any:
    """The class of both actors."""
    import ray
    import torch

    class Actor:
        """Makes tensors, and checks those of the other."""

        @ray.method(tensor_transport=aioray.NAME)  # type: ignore[untyped-decorator]
        def make(self, nbytes: int) -> Any:
            """A tensor of so many bytes."""
            return (torch.arange(nbytes, dtype=torch.int64) % PRIME).to(torch.uint8)

        def check(self, given: Any, nbytes: int) -> bool:
            """Whether `given` is that of `make`."""
            return bool(torch.equal(given, (torch.arange(nbytes, dtype=torch.int64) % PRIME).to(torch.uint8)))

        def touch(self, given: Any) -> int:
            """Take a tensor and do nothing with it."""
            return int(given.numel())

        def seen(self) -> Any:
            """The statistics of the transport."""
            return aioray.statistics()

    return ray.remote(num_cpus=0)(Actor)


def _show() -> bool:
    import ray

    actor = _actor()
    sender, receiver = actor.remote(), actor.remote()
    right = True
    for nbytes in SIZES:
        made = sender.make.remote(nbytes)
        right = ray.get(receiver.check.remote(made, nbytes), timeout=SECONDS) and right
        times = []
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            ray.get(receiver.touch.remote(made), timeout=SECONDS)
            times.append(time.perf_counter() - begin)
        print(f"{nbytes:>9} bytes in {min(times) * 1e3:.1f} ms, Ray's calls included: {'verified' if right else 'WRONG'}")
    ways = sorted(set(ray.get(receiver.seen.remote(), timeout=SECONDS).ways.values()))
    print(f"Ray {ray.__version__}; the receiver reads the sender's memory by {', '.join(ways)}")
    return right


def main() -> int:
    """Start a Ray, show the transport, and end it; 1 where bytes were wrong or something is missing."""
    try:
        aioray.register()
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        return 1
    import ray

    directory = tempfile.mkdtemp(prefix="ray")  # short: Ray puts sockets beneath it
    ray.init(
        num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", _temp_dir=directory, log_to_driver=False,
        configure_logging=False, object_store_memory=100 << 20,
    )  # fmt: skip
    try:
        return 0 if _show() else 1
    finally:
        ray.shutdown()
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
