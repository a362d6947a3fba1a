"""An all-to-all over several hosts: ranks of one host by shared memory, the others by the network."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from subprocess import PIPE

import pytest

from tests.hosts.net import Hosts
from tests.moe.test_processes import CONFIG, command, lines, until
from tests.needs import needs_hosts

pytestmark = [*needs_hosts(), pytest.mark.timeout(120)]


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with Hosts(2) as made:
        yield made


def test_paths_are_mixed_and_a_host_may_go(hosts: Hosts) -> None:
    places = [hosts[0], hosts[0], hosts[1], hosts[1]]
    addresses = [f"{place.address}:{7101 + rank}" for rank, place in enumerate(places)]
    environ = f"MOE_CONFIG={json.dumps(CONFIG)}"
    processes = [
        place.popen(["env", environ, *command(rank, 300, 0.01, addresses)], stdout=PIPE) for rank, place in enumerate(places)
    ]
    try:
        for rank, process in enumerate(processes):
            paths = next(lines(process))["paths"]
            mate = addresses[rank ^ 1]
            assert paths[mate] == "shm"
            assert {paths[a] for a in addresses if a not in (mate, addresses[rank])} == {"tcp"}
            assert until(process, 20)["lost"] == []
        hosts[1].kill()
        began = time.monotonic()
        for rank in (0, 1):
            assert any(s.get("lost") == [2, 3] for s in lines(processes[rank]))
            assert time.monotonic() - began < 20
            assert until(processes[rank], 299)["lost"] == [2, 3]
    finally:
        for process in processes:
            assert process.stdout is not None
            process.stdout.close()
