"""Two Ray actors: one writes the other's memory, and the other knows by a counter when it is all there.

    pip install ray
    python examples/ray_two_actors.py

Ray starts the actors and carries one address between them; the bytes go from memory to memory. Each actor's engine lives on the
event loop of that actor, beside its other calls. Both actors are on this machine; on a cluster give them one AIOTRANSFER_KEY
(`runtime_env`) and `listen` on the address of their host. Only the public API is used.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from typing import Any

import numpy as np
import ray

import aiotransfer as at

PAGE = 64 << 10
PAGES = 256
LANDED = 7  # the immediate that travels with every page


def contents(seed: int) -> np.ndarray:
    """What the writer sends, and the owner expects."""
    return np.random.default_rng(seed).integers(0, 256, PAGE * PAGES, np.uint8)


class Actor:
    """An engine that lives as long as the actor."""

    def __init__(self) -> None:
        self.engine: Any = None

    async def open(self) -> str:
        """Open the engine on the actor's event loop; its address."""
        self.engine = await at.open_engine(name=type(self).__name__, timeout=30)
        return str(self.engine.address)

    async def close(self) -> None:
        await self.engine.aclose()


@ray.remote
class Owner(Actor):
    """Owns the memory."""

    async def publish(self) -> None:
        self.cache = self.engine.allocate(PAGE * PAGES)
        self.landed = self.engine.counter(imm=LANDED)
        self.engine.publish("cache", self.cache)

    async def wait(self, seed: int) -> bool:
        """Returns when all pages have landed: whether they hold what was sent."""
        await self.landed.wait(PAGES)
        return bool(np.array_equal(self.cache.numpy(), contents(seed)))


@ray.remote
class Writer(Actor):
    """Writes into it."""

    async def write(self, address: str, seed: int) -> str:
        """All pages in an order of their own, in one call; by which way they went."""
        owner = await self.engine.connect(address)
        source = self.engine.register(contents(seed))
        pages = np.random.default_rng(seed).permutation(PAGES)
        await self.engine.write_pages(source, pages, await owner.lookup("cache"), pages, page_bytes=PAGE, imm=LANDED)
        return str(owner.path.provider)


def transfer(seed: int) -> bool:
    """Start both, let one write into the other."""
    owner, writer = Owner.remote(), Writer.remote()
    address, _ = ray.get([owner.open.remote(), writer.open.remote()], timeout=60)
    ray.get(owner.publish.remote(), timeout=60)
    intact = owner.wait.remote(seed)  # on its way before the first byte is
    provider = ray.get(writer.write.remote(address, seed), timeout=60)
    right = ray.get(intact, timeout=60)
    ray.get([writer.close.remote(), owner.close.remote()], timeout=60)
    print(f"{PAGES} pages of {PAGE} bytes from one actor into the other by {provider}: {'verified' if right else 'WRONG'}")
    return right


def main() -> int:
    """A Ray of this machine alone, gone afterwards with all its processes and files."""
    directory = tempfile.mkdtemp(prefix="ray")  # short: Ray puts sockets beneath it
    ray.init(
        num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", _temp_dir=directory, log_to_driver=False,
        configure_logging=False, object_store_memory=100 << 20,
    )  # fmt: skip
    try:
        return 0 if transfer(seed=7) else 1
    finally:
        ray.shutdown()
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
