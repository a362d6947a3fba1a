"""Processes of sibling PID namespaces, as pods of one host: neither has a number for the other; a death is still proved."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import aiotransfer as at
from aiotransfer.providers.shm import pidfd

KEY = "a key that both pods have"
POD = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable, str(Path(__file__))]
NBYTES = 256 << 20
TIMEOUT = 60.0


def _missing() -> str | None:
    if shutil.which("unshare") is None:
        return "there is no unshare"
    done = subprocess.run([*POD[:5], "true"], capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else done.stderr.strip()


@pytest.mark.skipif(_missing() is not None, reason=f"no PID namespace can be made: {_missing()}")
@pytest.mark.parametrize("kernel", ["knows", "does not know"])
def test_the_death_of_a_sibling_is_proof_and_its_pages_come_back(kernel: str) -> None:
    environment = {**os.environ, "AIOTRANSFER_KEY": KEY, "AIOTRANSFER_PROVIDERS": "shm"}
    owner = subprocess.Popen([*POD, "owner", kernel], env=environment, stdout=subprocess.PIPE, text=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(owner)
        stack.callback(owner.kill)
        assert owner.stdout is not None
        address = owner.stdout.readline().split()[-1]
        writer = subprocess.Popen([*POD, "writer", kernel, address], env=environment)
        stack.callback(writer.wait)
        stack.callback(writer.kill)
        assert owner.stdout.readline() == "its number here is 0\n"
        assert owner.stdout.readline() == "lost: revoked 0\n"


async def owner() -> None:
    async with at.open_engine(timeout=TIMEOUT) as engine:
        print("listening at", engine.address, flush=True)
        pool = engine.allocate(NBYTES)
        peer = await anext(engine.arrivals())
        lease = pool.lease(peer)
        await peer.send(lease.descriptor.encode())
        print(f"its number here is {peer.path.channel.pid}", flush=True)  # type: ignore[attr-defined]
        with contextlib.suppress(at.PeerLostError):
            await peer.closed()
        async with asyncio.timeout(TIMEOUT):
            while engine.statistics().quarantined_bytes:
                await asyncio.sleep(0.01)
        print("lost:", lease.state, engine.statistics().quarantined_bytes, flush=True)


async def writer(address: str) -> None:
    async with at.open_engine(timeout=TIMEOUT) as engine:
        await engine.connect(address)
        async for message in engine.messages():
            there = at.RemoteRegion.decode(message.data)
            break
        source = engine.allocate(there.nbytes)
        await engine.write(source, there)
        asyncio.get_running_loop().call_later(0.2, os._exit, 9)  # the native thread is inside a copy: only its death is proof
        handle = engine.from_thread()
        while True:
            write = handle.write(source, there)
            while not write.done():
                await asyncio.sleep(0)


if __name__ == "__main__":
    role, knows, *rest = sys.argv[1:]
    if knows == "does not know":  # a kernel before 6.5
        pidfd.kernel_knows_peers = lambda: False  # type: ignore[assignment]
    asyncio.run({"owner": owner, "writer": writer}[role](*rest))
