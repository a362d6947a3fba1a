"""A shm peer that owns its end of a real path and scribbles over it: nothing crashes, hangs or is written elsewhere."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

import aiotransfer as at
from aiotransfer.control import frames
from aiotransfer.providers.shm import fd_listener, messages

from .rawshm import ACTIVE, WORDS, RawShm, block

SCRIBBLER = Path(__file__).with_name("scribbler.py")
SECONDS = 0.6


@pytest_asyncio.fixture
async def engine() -> AsyncIterator[at.Engine]:
    """It must go on serving a friend, byte for byte."""
    async with at.open_engine(providers="shm", timeout=20) as engine:
        yield engine
        async with at.open_engine(providers="shm", timeout=20) as friend:
            await serves(engine, friend, await friend.connect(engine.address))


async def serves(engine: at.Engine, friend: at.Engine, peer: at.Peer, rounds: int = 1) -> None:
    memory = engine.allocate(1 << 16)
    source = friend.register(np.arange(1 << 16, dtype=np.uint8))
    counter = engine.counter()
    for _ in range(rounds):
        memory.numpy()[:] = 0
        await friend.write(source, memory.descriptor, imm=counter.imm)
        await counter.wait(1)
        assert np.array_equal(memory.numpy(), np.arange(1 << 16, dtype=np.uint8))
        await peer.ping()
    assert (counter.value, counter.total) == (0, rounds)
    counter.close()
    memory.close()


def scribble(fd: int, seed: int, words: tuple[str, ...], bell: int = -1, seconds: float = SECONDS) -> subprocess.Popen[bytes]:
    places = ["{}:{}".format(*WORDS[word]) if word in WORDS else word for word in words]
    command = [sys.executable, str(SCRIBBLER), str(fd), str(seed), str(seconds), str(bell), *places]
    return subprocess.Popen(command, pass_fds=[fd] if bell < 0 else [fd, bell])


async def over(process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        await asyncio.sleep(0.005)
    assert process.returncode == 0


async def lost(engine: at.Engine, shm: RawShm) -> None:
    async with asyncio.timeout(10):
        while shm.incarnation in engine._connections.peers:
            await asyncio.sleep(0.001)


@pytest.mark.filterwarnings("ignore:.*inside a write:ResourceWarning")  # as it claims
@pytest.mark.asyncio
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(
    "words", [("active", "ping"), ("dirty", "summary", "bitmap"), ("imm", "count"), tuple(WORDS)], ids="+".join
)
async def test_scribbling_over_its_own_words_harms_nobody_else(engine: at.Engine, words: tuple[str, ...], seed: int) -> None:
    shm = await RawShm.open(engine)
    canary = engine.allocate(1 << 16)
    canary.numpy()[:] = 0xA5
    process = scribble(shm.theirs[1], seed, words, shm.theirs[2])
    async with at.open_engine(providers="shm", timeout=20) as friend:
        peer = await friend.connect(engine.address)
        while process.poll() is None:
            await serves(engine, friend, peer)
    await over(process)
    # It claims to be inside a write no longer: until then, what it named stays quarantined.
    shm.inbound.bytes[64 : 64 + ACTIVE] = 0
    assert (canary.numpy() == 0xA5).all()
    await shm.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_scribbling_over_what_a_writer_reads_keeps_it_within_the_memory_it_was_given(engine: at.Engine, seed: int) -> None:
    shm = await RawShm.open(engine)
    peer = engine.peers[0]
    outer = np.full(3 * 65536, 0xA5, np.uint8)
    engine_side = asyncio.create_task(peer.lookup("x"))
    # foreign memory cannot be offered without a probe: the engine must say so, or write only where it was told
    await shm.answer_lookup(shm.region(outer[65536:131072]))
    with pytest.raises(at.RegistrationError):
        await engine_side
    out = scribble(shm.outbound.fd, seed, ("pong", "barred", "drained"))
    control = scribble(shm.control.fd, seed, ("64:4", f"128:{8 * 65536}"), shm.doorbell)
    outcomes: set[str] = set()
    imm = 0
    while out.poll() is None or control.poll() is None:
        imm += 1
        try:
            await engine.signal(peer, imm % 3000, timeout=0.05)
            outcomes.add("ok")
        except at.TransferError as error:
            outcomes.add(type(error).__name__)
        peer.state  # noqa: B018 - reads the pongs
    await over(out)
    await over(control)
    assert "ok" in outcomes
    assert outcomes <= {"ok", "TransferTimeout", "BusyError", "PeerLostError"}
    assert (outer == 0xA5).all()
    await shm.close()


@pytest.mark.asyncio
async def test_a_segment_is_written_only_within_its_descriptor_whatever_its_owner_scribbles(engine: at.Engine) -> None:
    shm = await RawShm.open(engine)
    peer = engine.peers[0]
    fd = sealed(1 << 20, allocate=True)
    dst = await fetched(shm, peer, fd, 1 << 20)
    control = scribble(shm.control.fd, 5, (f"{128 + 24}:8",))
    source = engine.register(np.full(4096, 7, np.uint8))
    outcomes: set[str] = set()
    while control.poll() is None:
        try:
            await engine.write(source, dst[8192 : 8192 + 4096])
            outcomes.add("ok")
        except at.StaleRegionError:
            outcomes.add("stale")
        shm.control.word(128 + 24)[0] = 1
    landed = np.frombuffer(os.pread(fd, 1 << 20, 0), np.uint8)
    assert outcomes == {"ok", "stale"}
    assert landed.sum() == 7 * 4096 == landed[8192:12288].sum()
    os.close(fd)
    await shm.close()


def sealed(nbytes: int, *, allocate: bool) -> int:
    import fcntl

    fd = os.memfd_create("segment", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, nbytes)
    if allocate:
        os.posix_fallocate(fd, 0, nbytes)
    fcntl.fcntl(fd, 1033, 7)
    return fd


async def fetched(shm: RawShm, peer: at.Peer, fd: int, nbytes: int, told: int | None = None) -> at.RemoteRegion:
    """The engine looks something up and is sent this segment."""
    from aiotransfer.model.descriptor import Grant, RemoteRegion

    shm.control.word(128 + 24)[0] = 1
    grant = Grant("127.0.0.1:1", shm.incarnation, 1 << 20, nbytes, "write", "cpu", 3, 1, 77, 0, ())
    lookup = asyncio.ensure_future(peer.lookup("x", timeout=10))
    try:
        await shm.answer_lookup(RemoteRegion.of(grant))
        asked = await shm.raw.hear(frames.Ask)
        assert isinstance(asked, frames.Ask)
        question = messages.question(asked.body)
        shm.send_descriptors(question.ticket, [fd])
        await shm.raw.say(frames.Answer(asked.id, messages.encode(messages.Size(nbytes if told is None else told))))
        return await lookup
    finally:
        lookup.cancel()


@pytest.mark.asyncio
@pytest.mark.parametrize("told", [None, -1, 0, 5, 1 << 62, (1 << 64) - 1])
async def test_a_segment_that_was_never_allocated_or_has_another_size_is_refused(engine: at.Engine, told: int | None) -> None:
    shm = await RawShm.open(engine)
    fd = sealed(1 << 30, allocate=False)
    with pytest.raises((at.RegistrationError, at.BrokenError), match=r"allocated|size|malformed|map"):
        await fetched(shm, engine.peers[0], fd, 1 << 30, told)
    assert os.fstat(fd).st_blocks == 0, "nothing of it was touched"
    os.close(fd)
    await shm.close()


@pytest.mark.asyncio
async def test_doorbells_that_are_full_and_block_stop_nobody(engine: at.Engine) -> None:
    shm = await RawShm.open(engine)
    for fd in (shm.doorbell, shm.pulse, *shm.theirs[2:]):
        block(fd)
    shm.control.bytes[64] = 1  # armed: ring at every count
    begun = time.monotonic()
    for imm in range(50):
        await engine.signal(engine.peers[0], imm)
        shm.outbound.bytes[WORDS["dirty"][0]] = 0
    peer = engine.peers[0]
    engine._liveness.watch(peer)
    engine._liveness._round()
    async with at.open_engine(providers="shm", config=at.Config(peer_timeout=0.4)) as friend:
        other = await friend.connect(engine.address)
        with pytest.raises(at.TransferTimeout):  # pulses through the blocked eventfd: still answered, so that nobody is lost
            await other.lookup("never", timeout=1.2)
        assert other.state == "up"
    assert time.monotonic() - begun < 20
    await shm.close()


@pytest.mark.asyncio
async def test_rings_without_arrivals_end_the_connection(engine: at.Engine) -> None:
    shm = await RawShm.open(engine)
    for _ in range(100):  # honest ones: each with an arrival
        for slot in range(200):
            shm.arrive(slot, 1, int(shm.inbound.word(WORDS["count"][0] + 8 * slot)[0]) + 1)
        await asyncio.sleep(0)
    assert engine.counter(imm=1).value >= 199 * 100
    assert engine.peers
    async with asyncio.timeout(30):
        while engine.peers:
            for _ in range(100):
                shm.ring()
                engine._progress.poll()
            await asyncio.sleep(0)
    await lost(engine, shm)
    await shm.close()


@pytest.mark.asyncio
async def test_a_flood_of_pulses_costs_little(engine: at.Engine) -> None:
    shm = await RawShm.open(engine)
    before, begun = engine.statistics().pulses_answered, time.monotonic()
    while time.monotonic() - begun < SECONDS:
        for _ in range(100):
            shm.ring(3)
        await asyncio.sleep(0)
    answered = engine.statistics().pulses_answered - before
    assert 0 < answered <= (time.monotonic() - begun) / 0.0002 + 2
    await shm.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("wrong", ["doorbell", "pulse", "control", "outbound"])
@pytest.mark.parametrize("what", ["pipe", "file", "unsealed memory"])
async def test_descriptors_of_another_kind_are_refused(engine: at.Engine, wrong: str, what: str, tmp_path: Path) -> None:
    shm = await RawShm.begin(engine)
    ends: list[int] = []
    if what == "pipe":
        fd, other = os.pipe()
        ends.append(other)
    elif what == "file":
        fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    else:
        fd = os.memfd_create("open")
        os.ftruncate(fd, 1 << 20)
    holder: Any = shm if wrong in ("doorbell", "pulse") else getattr(shm, wrong)
    name = wrong if holder is shm else "fd"
    os.close(getattr(holder, name))
    setattr(holder, name, fd)
    await shm.introduce()
    refused = await shm.raw.hear(frames.Failed)
    assert isinstance(refused, frames.Failed)
    assert "shared memory was refused" in refused.text
    for end in ends:
        os.close(end)
    await shm.close()


@pytest.mark.asyncio
async def test_one_ticket_for_two_questions_is_answered_twice_with_one_path(engine: at.Engine) -> None:
    shm = await RawShm.begin(engine)
    hello = messages.encode(messages.Hello(b"u" * 16))
    await shm.raw.say(frames.Ask(5, "shm", hello), frames.Ask(6, "shm", hello))
    refused = await shm.raw.hear(frames.Failed)
    assert isinstance(refused, frames.Failed)
    assert refused.id == 6
    await shm.introduce()
    assert isinstance(await shm.raw.hear(frames.Answer), frames.Answer)
    await shm.close()


@pytest.mark.asyncio
async def test_strangers_at_the_descriptor_socket_do_not_shut_friends_out(engine: at.Engine) -> None:
    name = next(t.data for t in engine._offers() if t.provider == "shm")
    silent, early = [], []
    for i in range(150):
        for kind, packet in ((silent, b""), (early, i.to_bytes(16, "little"))):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            sock.connect(name)
            if packet:
                sock.send(packet)
            kind.append(sock)
            for _ in range(3):
                await asyncio.sleep(0)
    shm = await RawShm.open(engine)
    listener: Any = engine._providers["shm"]
    assert len(listener._listener._strangers) <= 64
    await shm.close()
    for sock in silent + early:
        sock.close()


@pytest.mark.asyncio
async def test_who_says_nothing_at_the_descriptor_socket_is_dropped_in_time(
    engine: at.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fd_listener, "EARLY_SECONDS", 0.1)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(next(t.data for t in engine._offers() if t.provider == "shm"))
    sock.setblocking(False)
    assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 1), 5) == b""
    sock.close()
