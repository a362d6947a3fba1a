import pytest
from aiotransfer.testing import engine_pair


@pytest.mark.asyncio
async def test_a_signal_is_counted():
    async with engine_pair("loopback") as pair:
        await pair.left.signal(pair.right_peer, imm=7)
        await pair.right.counter(imm=7).wait(1, timeout=5)
