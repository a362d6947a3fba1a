"""The contract of the provider port between engines of different hosts: every byte of it crosses a cable."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any, ClassVar

import pytest

from aiotransfer.engine.runtime.platform import Platform
from aiotransfer.testing import Pair
from aiotransfer.testing.contract import ProviderContract
from aiotransfer.testing.pairs import Member
from tests.hosts.faraway import carried, group_between, pair_between
from tests.hosts.net import Hosts
from tests.needs import needs_hosts
from tests.providers.fabric.test_fabric import LIKE_EFA

pytestmark = [pytest.mark.asyncio, *needs_hosts()]
NBYTES = 8 << 20


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with Hosts(4) as made:
        yield made


class BetweenHosts(ProviderContract):
    """Whose engines are far from each other."""

    provider = "tcp"
    hosts: ClassVar[Hosts]

    @pytest.fixture(autouse=True)
    def _place(self, hosts: Hosts) -> None:
        type(self).hosts = hosts

    def pair(self) -> AbstractAsyncContextManager[Pair]:
        return pair_between(self.hosts, providers=self.provider, timeout=10.0, **self.options)

    def group(self, n: int) -> AbstractAsyncContextManager[list[Member]]:
        return group_between(self.hosts, n, providers=self.provider, timeout=10.0, **self.options)


class TestTcp(BetweenHosts):
    pass


class TestLikeEfa(BetweenHosts):
    options: ClassVar[dict[str, Any]] = {"_platform": Platform(restrictions=LIKE_EFA)}


async def test_bytes_both_ways_are_seen_at_both_ends_of_the_cable(hosts: Hosts) -> None:
    async with pair_between(hosts, providers="tcp") as pair:
        region = pair.right.allocate(NBYTES)
        pair.right.publish("target", region)
        pair.right.publish("readable", region, access="read")
        local = pair.left.allocate(NBYTES)
        before = [carried(host, "eth0") for host in (hosts[0], hosts[1])]
        await pair.left.write(local, await pair.right_peer.lookup("target"))
        await pair.left.read(await pair.right_peer.lookup("readable"), local)
        after = [carried(host, "eth0") for host in (hosts[0], hosts[1])]
    for (received, sent), (received_then, sent_then) in zip(before, after, strict=True):
        assert received_then - received > NBYTES
        assert sent_then - sent > NBYTES
