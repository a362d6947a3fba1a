"""Memory whose pages are withheld holds up one native thread, and nobody else."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from aiotransfer.providers import native
from aiotransfer.testing import engine_pair
from tests.needs import needs_tcp

from .withheld import can_withhold

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="foreign memory is reached on Linux")


def run(*scenario: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.withheld", *scenario], capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("ok\n")


@pytest.mark.parametrize("scenario", ["others_go_on", "many_of_one_process"])
def test_a_page_that_is_withheld_stops_nobody(scenario: str) -> None:
    if not can_withhold():
        pytest.skip("userfaultfd is not permitted here")
    run(scenario)


@pytest.mark.parametrize("provider", ["shm", "loopback", pytest.param("tcp", marks=needs_tcp())])
@pytest.mark.parametrize("kind", ["plain", "file"])
def test_memory_of_ours_that_is_withheld_stops_nobody(provider: str, kind: str) -> None:
    if not can_withhold():
        pytest.skip("userfaultfd is not permitted here")
    run("sources_of_ours", provider, kind)


@needs_tcp()
def test_what_waits_for_a_page_ends_when_its_target_is_taken_back() -> None:
    if not can_withhold():
        pytest.skip("userfaultfd is not permitted here")
    run("taken_back_meanwhile", "tcp")


def test_a_thread_that_is_held_up_inside_a_copy_stops_nobody() -> None:
    run("held_inside_a_copy")


@pytest.mark.asyncio
async def test_a_copy_inside_the_call_holds_no_lock() -> None:
    """Another thread uses the engine while the loop's thread stands still in the middle of a copy."""
    lib, seen = native.lib, list[tuple[int, int]]()
    async with engine_pair("shm") as pair:
        region = pair.right.allocate(4096)
        pair.right.publish("target", region)
        target = await pair.right_peer.lookup("target")
        source = pair.left.allocate(4096)
        await pair.left.write(source, target)
        number = pair.right_peer.path.lane_peer

        def look() -> None:
            while not lib.at_shm_held():
                time.sleep(0.001)
            seen.append((lib.at_peer_queued(pair.left._p, number), lib.at_shm_held()))
            lib.at_shm_hold(0)

        thread, rescue = threading.Thread(target=look), threading.Timer(10, lib.at_shm_hold, (0,))
        lib.at_shm_hold(1)
        thread.start()
        rescue.start()
        await pair.left.write(source, target)
        rescue.cancel()
        thread.join()
        rescue.join()
    assert seen == [(0, 1)]
