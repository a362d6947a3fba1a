"""Resuming a conversation, without a network: whatever is cut, whenever, each frame is heard once and in order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiotransfer.control import frames
from aiotransfer.control.frames import PeerInfo
from aiotransfer.control.resume import ACK_FRAMES, ReplayLog, Silence, counted, further, ways
from aiotransfer.errors import BusyError, RendezvousError

SECRET = b"s" * 32
Sent = bytes | frames.Acknowledge | frames.Resume | frames.Resumed


class Side:
    """One engine's end: what it has said and heard, its log, and its present connection, by number (0: none)."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.log = ReplayLog(SECRET)
        self.connection = 1
        self.said: list[bytes] = []
        self.heard: list[bytes] = []


class World:
    """Two sides, and the connections there have been between them, each with what is under way in each direction."""

    def __init__(self) -> None:
        self.sides = {"dialer": Side("dialer"), "acceptor": Side("acceptor")}
        self.wires: dict[int, dict[str, list[Sent]]] = {1: {"dialer": [], "acceptor": []}}  # to whom
        self.offered = 0  # the connection of the last attempt to resume

    def other(self, side: Side) -> Side:
        return self.sides["acceptor" if side.name == "dialer" else "dialer"]

    def write(self, side: Side, number: int, *what: Sent) -> None:
        if number in self.wires:
            self.wires[number][self.other(side).name].extend(what)

    def say(self, name: str) -> None:
        side = self.sides[name]
        data = f"{name} {len(side.said)}".encode()
        side.said.append(data)
        side.log.send(data)
        self.write(side, side.connection, data)

    def acknowledge(self, name: str) -> None:
        side = self.sides[name]
        self.write(side, side.connection, side.log.acknowledge())

    def deliver(self, name: str, number: int, count: int) -> None:
        """So many frames of one connection, also of one that this side has given up: it does not listen then."""
        side = self.sides[name]
        for _ in range(count):
            if number not in self.wires or not self.wires[number][name]:
                return
            self._hear(side, number, self.wires[number][name].pop(0))

    def _hear(self, side: Side, number: int, frame: Sent) -> None:
        tag = b"connection %d" % number
        if isinstance(frame, frames.Resume):
            try:
                answer, unheard = side.log.resumed(frame, tag)
            except RendezvousError:
                assert frame.attempt < self.offered, "only an attempt that was overtaken is refused"
                return
            side.connection = number
            self.write(side, number, answer, *unheard)
        elif isinstance(frame, frames.Resumed):
            if number == self.offered:
                self.write(side, number, *side.log.go_on(frame, tag))
                side.connection = number
        elif number != side.connection:
            pass
        elif isinstance(frame, frames.Acknowledge):
            side.log.acknowledged(frame.received)
        else:
            side.heard.append(frame)
            side.log.receive(len(frame))

    def cut(self, number: int) -> None:
        """All that is under way by it is lost."""
        self.wires.pop(number, None)

    def resume(self) -> None:
        """The dialer begins on a new connection; the ones before may go on to deliver."""
        side = self.sides["dialer"]
        number = max([*self.wires, self.offered, 1]) + 1
        self.wires[number] = {"dialer": [], "acceptor": []}
        self.offered, side.connection = number, 0
        self.write(side, number, side.log.resume(b"connection %d" % number))

    def check(self) -> None:
        for side in self.sides.values():
            said = self.other(side).said
            assert side.heard == said[: len(side.heard)], "something is missing, doubled or out of order"


SIDES = st.sampled_from(["dialer", "acceptor"])
STEPS = st.one_of(
    st.tuples(st.just("say"), SIDES),
    st.tuples(st.just("acknowledge"), SIDES),
    st.tuples(st.just("deliver"), SIDES, st.integers(0, 3), st.integers(1, 8)),
    st.tuples(st.just("cut"), st.integers(0, 3)),
    st.tuples(st.just("resume")),
)


@given(st.lists(STEPS, max_size=120))
def test_whatever_is_cut_each_frame_is_heard_once_and_in_order(steps: list[tuple[object, ...]]) -> None:
    world = World()
    for step in steps:
        match step:
            case "deliver", str(name), int(back), int(count):
                world.deliver(name, max([*world.wires, 1]) - back, count)
            case "cut", int(back):
                world.cut(max([*world.wires, 1]) - back)
            case str(what), *arguments:
                getattr(world, what)(*arguments)
        world.check()
    world.resume()
    for _ in range(3):
        for name in ("acceptor", "dialer"):
            world.deliver(name, world.offered, 10_000)
    world.check()
    for side in world.sides.values():
        assert side.heard == world.other(side).said, "all of it is there at the end"
        world.acknowledge(side.name)
    for name in ("acceptor", "dialer"):
        world.deliver(name, world.offered, 10_000)
    for side in world.sides.values():
        assert not side.log.keeps
        assert side.log.kept_bytes == 0


def pair() -> tuple[ReplayLog, ReplayLog]:
    return ReplayLog(SECRET), ReplayLog(SECRET)


def test_nobody_resumes_without_the_secret_of_the_session_or_by_another_connection() -> None:
    dialer, acceptor = pair()
    dialer.send(b"one")
    for offer, tag in (
        (ReplayLog(b"x" * 32).resume(b"new"), b"new"),  # has the key, but did not make the session
        (dialer.resume(b"recorded"), b"new"),  # a recorded one, by another connection
        (frames.Resume(9, 0, b""), b"new"),
        (frames.Resume(-1, 0, b"m" * 32), b"new"),
        (frames.Resume(1, 1 << 64, b"m" * 32), b"new"),
    ):
        with pytest.raises(RendezvousError):
            acceptor.resumed(offer, tag)
    answer, unheard = acceptor.resumed(dialer.resume(b"new"), b"new")
    assert not unheard
    for false in (frames.Resumed(1, answer.mac), frames.Resumed(0, b""), frames.Resumed(0, b"m" * 32)):
        with pytest.raises(RendezvousError):
            dialer.go_on(false, b"new")
    with pytest.raises(RendezvousError):
        dialer.go_on(answer, b"another")
    assert dialer.go_on(answer, b"new") == [b"one"]


def test_a_proof_is_not_its_own_answer() -> None:
    dialer, _ = pair()
    offer = dialer.resume(b"new")
    with pytest.raises(RendezvousError):
        dialer.go_on(frames.Resumed(offer.received, offer.mac), b"new")


def test_an_attempt_that_was_overtaken_is_refused() -> None:
    dialer, acceptor = pair()
    first, second = dialer.resume(b"a"), dialer.resume(b"b")
    acceptor.resumed(second, b"b")
    for old, tag in ((first, b"a"), (second, b"b")):
        with pytest.raises(RendezvousError, match="tried again"):
            acceptor.resumed(old, tag)


@pytest.mark.parametrize("count", [-1, 0, 4, 1 << 70])
def test_counts_that_cannot_be_are_refused_and_change_nothing(count: int) -> None:
    log = ReplayLog(SECRET)
    for data in (b"1", b"2", b"3"):
        log.send(data)
    log.acknowledged(1)
    with pytest.raises(RendezvousError):
        log.acknowledged(count)
    log.acknowledged(3)
    assert not log.keeps


def test_what_is_kept_is_bounded() -> None:
    log = ReplayLog(SECRET, most_kept=100)
    log.send(bytes(200))  # one frame always has room
    log.acknowledged(1)
    log.send(bytes(60))
    with pytest.raises(BusyError):
        log.send(bytes(60))
    assert (log.kept_bytes, log.sent) == (60, 2)


def test_acknowledgements_are_few() -> None:
    log = ReplayLog(SECRET)
    assert not any(log.receive(10) for _ in range(ACK_FRAMES - 1))
    assert log.receive(10)
    assert log.acknowledge() == frames.Acknowledge(ACK_FRAMES)
    assert not log.owes
    assert log.receive(1 << 20), "large ones are not kept for long"


def test_what_is_of_the_connection_is_not_counted() -> None:
    assert not counted(frames.Acknowledge(1))
    assert not counted(frames.Goodbye("bye"))
    assert counted(frames.Ping(1))
    assert counted(frames.Up())


def test_addresses_that_lead_nowhere_are_no_ways() -> None:
    def info(*others: str) -> PeerInfo:
        return PeerInfo("x", "10.0.0.1:7", 1, [], further=list(others))

    told = info("10.0.1.1:7", "127.0.0.1:7", "0.0.0.0:7", "a.host:7", "10.0.2.1:0", "rubbish", "[fe80::1]:7", "[fd00::1]:7", "")
    assert [str(address) for address in further(told)] == ["10.0.1.1:7", "[fd00::1]:7"]
    assert len(further(info(*(f"10.0.{i}.1:7" for i in range(100))))) <= frames.MOST_FURTHER
    here, there = ways(info("172.17.0.1:7", "10.0.1.1:7"), info("172.17.0.1:9"))
    assert [str(address) for address in here] == ["10.0.1.1:7"], "both have the bridge of their containers"
    assert not there


@given(st.lists(st.tuples(st.floats(0.01, 0.5), st.booleans(), st.booleans()), max_size=50))
def test_silence_is_only_what_is_unconfirmed_for_long_enough(looks: list[tuple[float, bool, bool]]) -> None:
    silence, now, heard = Silence(), 10.0, 10.0
    unconfirmed_since: float | None = None
    for step, outstanding, answered in looks:
        now += step
        if answered:
            heard = now
        told = silence.look(now, outstanding, heard, 1.0)
        if not outstanding:
            unconfirmed_since = None
        elif unconfirmed_since is None or heard > unconfirmed_since:
            unconfirmed_since = now
        if told:
            assert outstanding
            assert unconfirmed_since is not None
            assert now - unconfirmed_since >= 1.0 - 1e-9
