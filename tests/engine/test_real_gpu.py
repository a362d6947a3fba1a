"""With a real GPU and torch, where there are any: what is on the GPU arrives, and what arrives is on the GPU."""

from __future__ import annotations

from typing import Any

import pytest

import aiotransfer as at
from aiotransfer.testing import engine_pair

pytestmark = [pytest.mark.asyncio, pytest.mark.demo]
N = 1 << 20


@pytest.fixture
def torch() -> Any:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return torch


async def test_tensors_of_a_gpu_go_there_and_back(torch: Any) -> None:
    async with engine_pair("shm", timeout=20) as pair:
        here = torch.randint(0, 256, (N,), dtype=torch.uint8, device="cuda")
        there = torch.zeros(N, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        async with pair.left.register(here) as source, pair.right.register(there) as target:
            assert source._root._staging is not None
            assert source._root._staging.pinned
            arrived = pair.right.counter(imm=1)
            pair.right.publish("gpu", target)
            remote = await pair.right_peer.lookup("gpu")
            await pair.left.write(source[: N // 2], remote[: N // 2], imm=1)
            pages = list(range(N // 4096))
            await pair.left.write_pages(source, pages[128:], remote, pages[128:], page_bytes=4096, imm=1)
            await arrived.wait(1 + len(pages) - 128)
            await target.flush()
            assert torch.equal(here, there)
            host = pair.right.allocate(N)
            host.numpy()[:] = 7
            pair.right.publish("host", host, access="read")
            await pair.left.read(await pair.right_peer.lookup("host"), source)
            assert bool((here == 7).all())
            pair.right.unpublish("gpu")


async def test_the_driver_tells_what_is_memory_of_the_gpu(torch: Any) -> None:
    tensor = torch.zeros(64, device="cuda")
    async with engine_pair("shm") as pair:
        with pytest.raises(at.RegistrationError):
            pair.left.register((tensor.data_ptr() + (1 << 44), 8, "cuda:0"))
        async with pair.left.register(tensor, staging=False) as direct:
            assert direct.device == str(tensor.device)
