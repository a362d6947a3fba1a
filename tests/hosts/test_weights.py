"""Weights between hosts: ranks of one host by shared memory, the others by the network."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hosts.net import Hosts
from tests.needs import needs_hosts
from tests.weights.processes import World

pytestmark = [*needs_hosts(), pytest.mark.timeout(180)]


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with Hosts(2) as made:
        yield made


def test_trainers_and_inference_on_hosts_of_their_own(hosts: Hosts) -> None:
    with World() as world:
        world.train(hosts[0], hosts[0])
        servers = world.serve("a", hosts[1], hosts[1])
        for number in (1, 2):
            assert world.publish(number) == [{"version": [1, number]}] * 2
            for server in servers:
                said = server.look()
                assert (said["version"], said["holds"]) == ([1, number], number)
                assert "tcp" in said["paths"]


def test_paths_are_mixed_and_a_host_may_go(hosts: Hosts) -> None:
    with World() as world:
        world.train(hosts[0], hosts[1])
        near, far = world.serve("a", hosts[0], hosts[0]), world.serve("b", hosts[1], hosts[1])
        assert world.publish(1) == [{"version": [1, 1]}] * 2
        for server in [*near, *far]:
            said = server.look()
            assert said["holds"] == 1
            assert said["paths"] == ["shm", "tcp"]
        world.enter(2, rate=1000.0)
        hosts[1].kill()
        (said,) = world.leave(world.trainers[1])
        assert said["error"] == "UpdateError"
        assert said["committed"] == []
        for server in near:
            said = server.look()
            assert (said["version"], said["holds"]) == ([1, 1], 1)
