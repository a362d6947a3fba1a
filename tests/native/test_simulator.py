"""The lane over the simulated network: window, refill, withdrawal, epochs, faults, each fault seen to strike."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest

from aiotransfer.config import Config
from aiotransfer.providers import native
from aiotransfer.testing import payload
from aiotransfer.testing.lanes import MEMORY, LaneNet, SimLane

lib = native.lib
PAGE = 256
PAGES = MEMORY // PAGE


def filled(lane: SimLane, seed: int = 1) -> SimLane:
    lane.memory[:] = payload(MEMORY, seed)
    return lane


def test_bytes_land_and_the_immediate_counts_units() -> None:
    with LaneNet(2) as net:
        a, b = filled(net.lanes[0]), net.lanes[1]
        remote = a.reach(b, b.grant())
        a.write(remote, 0, 0, 1000, imm=1)
        a.write_pages(remote, [5, 9, 7], [1, 2, 3], PAGE, imm=2)
        a.signal(b, 3)
        net.run()
        assert (b.arrived(1), b.arrived(2), b.arrived(3)) == (1, 3, 1)
        expected = np.zeros(MEMORY, np.uint8)
        expected[:1000] = a.memory[:1000]
        for to, at in ((5, 1), (9, 2), (7, 3)):
            expected[to * PAGE :][:PAGE] = a.memory[at * PAGE :][:PAGE]
        assert np.array_equal(b.memory, expected)
        assert set(a.ended.values()) == {0}


def test_pages_are_read_and_count_nothing() -> None:
    with LaneNet(2) as net:
        a, b = net.lanes[0], filled(net.lanes[1])
        cookie = a.read_pages(a.reach(b, b.grant()), [1, 2, 3, 1], [5, 9, 7, 0], PAGE)
        net.run()
        assert a.ended == {cookie: 0}
        expected = np.zeros(MEMORY, np.uint8)
        for at, to in ((1, 5), (2, 9), (3, 7), (1, 0)):
            expected[to * PAGE :][:PAGE] = b.memory[at * PAGE :][:PAGE]
        assert np.array_equal(a.memory, expected)
        assert b.lane.statistics()["arrivals"] == 0


def test_a_read_of_pages_that_was_revoked_between_two_halves_fails() -> None:
    with LaneNet(2, delay=(10, 10), split=1000) as net:
        a, b = net.lanes[0], filled(net.lanes[1])
        grant = b.grant()
        cookie = a.read_pages(a.reach(b, grant), list(range(200)), list(range(200)), PAGE)
        net.step()
        b.revoke(grant)
        net.run()
        assert a.ended[cookie] == lib.AT_ESTALE


def test_no_more_than_the_window_is_posted_at_a_time() -> None:
    with LaneNet(2, delay=(10, 10)) as net:
        a, b = net.lanes
        a.write_pages(a.reach(b, b.grant()), list(range(200)), list(range(200)), PAGE, imm=1)
        most = net.counts()["waiting"]
        while net.step():
            most = max(most, net.counts()["waiting"])
        assert most == 64
        assert b.arrived(1) == 200


def test_what_is_withdrawn_is_not_posted_and_what_is_posted_is_waited_for() -> None:
    with LaneNet(2, delay=(10, 10)) as net:
        a, b = net.lanes
        cookie = a.write_pages(a.reach(b, b.grant()), list(range(200)), list(range(200)), PAGE, imm=1)
        assert a.cancel(cookie) == 64
        a.poll()
        assert cookie not in a.ended, "its posted pages still read the source"
        net.run()
        assert a.ended[cookie] == lib.AT_ECANCELED
        assert b.arrived(1) == 64


def test_what_completes_before_a_cancel_is_noticed_wins() -> None:
    with LaneNet(2, delay=(10, 10)) as net:
        a, b = net.lanes
        cookie = a.write(a.reach(b, b.grant()), 0, 0, 64)
        a.cancel(cookie)
        net.run()
        assert a.ended[cookie] == 0


def test_nothing_lands_under_a_revoked_grant() -> None:
    with LaneNet(2, delay=(10, 10)) as net:
        a, b = filled(net.lanes[0]), net.lanes[1]
        grant = b.grant()
        cookie = a.write(a.reach(b, grant), 0, 0, 64, imm=1)
        assert b.revoke(grant) == 0
        net.run()
        assert a.ended[cookie] == lib.AT_ESTALE
        assert b.arrived(1) == 0
        assert not b.memory.any()


def test_a_writer_stopped_inside_a_write_is_seen_until_it_goes_on() -> None:
    with LaneNet(2, delay=(10, 10), split=1000) as net:
        a, b = filled(net.lanes[0]), net.lanes[1]
        grant = b.grant()
        cookie = a.write(a.reach(b, grant), 0, 0, 64)
        net.step()
        net.hold(a)
        assert b.revoke(grant) == 1
        net.run()
        assert b.lane.grant_active(grant.slot) == 1
        net.hold(a, False)
        net.run()
        assert b.lane.grant_active(grant.slot) == 0
        assert a.ended[cookie] == 0


def test_the_death_of_a_stopped_writer_is_proof() -> None:
    with LaneNet(2, delay=(10, 10), split=1000) as net:
        a, b = filled(net.lanes[0]), net.lanes[1]
        grant = b.grant()
        a.write(a.reach(b, grant), 0, 0, 64)
        net.step()
        net.hold(a)
        assert b.revoke(grant) == 1
        net.kill(a)
        assert b.lane.grant_active(grant.slot) == 0
        b.poll()
        assert b.lost == [b.peers[a.incarnation]]
        net.run()
        assert not b.memory[32:].any(), "the second half never lands"


def test_writes_to_a_killed_lane_fail() -> None:
    with LaneNet(2, delay=(10, 10)) as net:
        a, b = net.lanes
        cookie = a.write(a.reach(b, b.grant()), 0, 0, 64)
        net.kill(b)
        net.run()
        assert a.ended[cookie] == lib.AT_EPEER


def test_a_failed_peer_ends_its_operations_at_once_and_nothing_lands_later() -> None:
    with LaneNet(2, delay=(10, 10)) as net:
        a, b = filled(net.lanes[0]), net.lanes[1]
        remote = a.reach(b, b.grant())
        cookies = [a.write_pages(remote, list(range(200)), list(range(200)), PAGE) for _ in range(3)]
        lib.at_peer_fail(a.lane.pointer, a.peers[b.incarnation], lib.AT_EPEER)
        a.poll()
        assert [a.ended[c] for c in cookies] == [lib.AT_EPEER] * 3
        net.run()
        assert not b.memory.any()


def test_a_fence_ends_what_was_cancelled_and_spares_the_rest() -> None:
    with LaneNet(2, delay=(10, 10)) as net:
        a, b = net.lanes
        remote = a.reach(b, b.grant())
        doomed, other = a.write(remote, 0, 0, 64), a.write(remote, 64, 64, 64)
        a.cancel(doomed)
        lib.at_fence(a.lane.pointer, doomed)
        a.poll()
        assert a.ended == {doomed: lib.AT_ECANCELED}
        net.run()
        assert a.ended[other] == 0


@pytest.mark.parametrize(
    ("to", "at", "nbytes", "status"),
    [
        (1, 0, MEMORY, lib.AT_EDST),
        (0, 1, MEMORY, lib.AT_ESRC),
        ((1 << 64) - 1, 0, 2, lib.AT_EDST),
        (0, (1 << 63), 1, lib.AT_ESRC),
    ],
)
def test_a_refused_write_leaves_no_trace(to: int, at: int, nbytes: int, status: int) -> None:
    with LaneNet(2) as net:
        a, b = net.lanes
        assert a.write(a.reach(b, b.grant()), to, at, nbytes) == status
        assert net.counts()["posted"] == 0
        assert a.lane.statistics()["pending_ops"] == 0


def test_queued_operations_are_bounded() -> None:
    with LaneNet(2, delay=(10, 10), config=Config(max_queued_operations=100)) as net:
        a, b = net.lanes
        remote = a.reach(b, b.grant())
        results = [a.write(remote, 0, 0, 8) for _ in range(101)]
        assert results[-1] == lib.AT_EBUSY
        assert min(results[:-1]) >= lib.AT_FIRST_COOKIE
        net.run()
        assert len(a.ended) == 100


def what_landed(operations: list[Any], begun: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    """The memory of each lane as these operations may have left it, each checked against how it ended."""
    expected = {k: v.copy() for k, v in begun.items()}
    for poster, b, a, cookie, pages, imm in operations:
        status = 0 if cookie == 0 or cookie == lib.AT_DUE else cookie if cookie < 0 else poster.ended[cookie]
        landed = 0
        for to_page, at_page in pages:
            place = slice(to_page * PAGE, (to_page + 1) * PAGE)
            source = begun[a.incarnation][at_page * PAGE :][:PAGE]
            whole = np.array_equal(b.memory[place], source)
            landed += whole
            if status == 0:
                assert whole, "success, but the bytes are not there"
            elif not whole:  # what failed may have landed by any part, from its front
                same = b.memory[place] == source
                front = int(np.argmin(same))
                assert np.array_equal(b.memory[place][front:], begun[b.incarnation][place][front:])
            expected[b.incarnation][place] = b.memory[place]
        units = len(pages) or 1
        if imm is None:
            continue
        if status == 0:
            assert b.arrived(imm) == (0 if cookie == 0 and not pages else units)
        else:
            assert b.arrived(imm) <= (landed if pages else 1), "counted what has not landed"
    return expected


def check_memory(lane: Any, expected: np.ndarray, revoked: np.ndarray | None, others: np.ndarray) -> None:
    """`revoked`: its memory when its grant was taken back; `others`: the pages that no read of its own changes."""
    assert np.array_equal(lane.memory, expected), "a byte landed where it may not"
    if revoked is not None:
        now, then = (memory.reshape(PAGES, PAGE)[others] for memory in (lane.memory, revoked))
        assert np.array_equal(now, then), "a byte landed after the revocation"
    stats = lane.lane.statistics()
    assert stats["pending_ops"] == 0
    assert stats["ops_ended"] == len(lane.ended)


def chaos(seed: int, struck: Counter[str]) -> int:
    """A random run against a model of every byte and count; returns the trace."""
    rng = random.Random(seed)
    faults = {"delay": (0, rng.choice([0, 1000])), "refuse": rng.choice([0, 200]), "split": rng.choice([0, 300])}
    with LaneNet(3, seed=seed, **faults) as net:  # type: ignore[arg-type]
        for i, lane in enumerate(net.lanes):
            lane.memory[:] = payload(MEMORY, seed=i + 1)
        begun = {lane.incarnation: lane.memory.copy() for lane in net.lanes}
        grants = {lane.incarnation: lane.grant() for lane in net.lanes}
        remotes = {(a, b): a.reach(b, grants[b.incarnation]) for a in net.lanes for b in net.lanes if a is not b}
        revoked: dict[int, np.ndarray] = {}
        free = {lane.incarnation: list(range(PAGES // 2, PAGES)) for lane in net.lanes}  # targets: the upper half, each page once
        operations = []  # (who posted it, target, source, cookie, [(to, at)], imm; None: it read)
        own: dict[int, list[int]] = {lane.incarnation: [] for lane in net.lanes}  # targets of its own reads
        for number in range(rng.randrange(5, 40)):
            a, b = rng.sample(net.lanes, 2)
            what = rng.random()
            n = min(rng.randrange(0, 6), len(free[b.incarnation]))
            to = [free[b.incarnation].pop() for _ in range(n)]
            at = [rng.randrange(PAGES // 2) for _ in to]
            if what < 0.4:
                cookie = a.write_pages(remotes[a, b], to, at, PAGE, imm=number)
                operations.append((a, b, a, cookie, list(zip(to, at, strict=True)), number))
            elif what < 0.6:
                own[b.incarnation] += to
                operations.append((b, b, a, b.read_pages(remotes[b, a], at, to, PAGE), list(zip(to, at, strict=True)), None))
            elif what < 0.7:
                operations.append((a, b, a, a.signal(b, number), [], number))
            elif what < 0.8 and operations:
                operations[-1][0].cancel(operations[-1][3])
            elif what < 0.84 and net.counts()["waiting"]:
                net.cut(a, b)
            elif what < 0.87 and b.incarnation not in revoked and b.revoke(grants[b.incarnation]) == 0:
                revoked[b.incarnation] = b.memory.copy()
            elif what < 0.9:
                net.hold(a)
                net.step()
                net.hold(a, False)
            for _ in range(rng.randrange(0, 8)):
                net.step()
        net.run()
        counts = net.counts()
        assert counts["waiting"] == 0
        expected = what_landed(operations, begun)
        for lane in net.lanes:
            others = np.ones(PAGES, bool)
            others[own[lane.incarnation]] = False
            check_memory(lane, expected[lane.incarnation], revoked.get(lane.incarnation), others)
        struck.update({name: n for name, n in counts.items() if name not in ("now", "trace", "waiting")})
        return counts["trace"]


def test_random_runs_match_the_model_and_every_fault_strikes() -> None:
    struck: Counter[str] = Counter()
    start = random.randrange(1 << 32)
    for seed in range(start, start + 300):
        try:
            chaos(seed, struck)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
    for fault in ("refused", "delayed", "reordered", "split", "stale", "lost", "held"):
        assert struck[fault] > 0, f"{fault} never struck"


def test_the_same_seed_gives_the_same_run() -> None:
    assert [chaos(seed, Counter()) for seed in range(20)] == [chaos(seed, Counter()) for seed in range(20)]
    assert len({chaos(seed, Counter()) for seed in range(20)}) == 20
