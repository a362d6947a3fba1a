"""Every decoder of bytes that somebody else wrote, each with what it must do with any input.

Used by the properties of `test_decoders` and by the coverage-guided fuzzer (`make fuzz`). A check returns True when the bytes
parsed, and then whatever they mean holds together; False when they were refused with the one documented error. Anything else is
a bug.
"""

from __future__ import annotations

import ipaddress
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from aiotransfer.control import frames
from aiotransfer.control.frames import (
    MAX_FRAME,
    PREAMBLE,
    VERSION,
    Acknowledge,
    Frame,
    FrameReader,
    Greeting,
    PeerInfo,
    Resume,
    Resumed,
)
from aiotransfer.control.handshake import Handshake, Role
from aiotransfer.control.key import Key
from aiotransfer.control.resume import ReplayLog, further
from aiotransfer.errors import BrokenError, DescriptorError, RendezvousError
from aiotransfer.kv.protocol import messages
from aiotransfer.kv.protocol.layout import MOST_POOL_BYTES, MOST_RANKS, KVLayout
from aiotransfer.kv.protocol.ranks import receivers
from aiotransfer.model import descriptor
from aiotransfer.model.descriptor import Grant, RemoteRegion
from aiotransfer.model.offer import ProviderOffer
from aiotransfer.providers import loopback
from aiotransfer.providers.fabric import messages as fabric_messages
from aiotransfer.providers.port import decode
from aiotransfer.providers.shm import fd_passing
from aiotransfer.providers.shm import messages as shm_messages

KEY = Key("shared", b"k" * 32)
INFO = PeerInfo("x", "127.0.0.1:1", 1, [ProviderOffer("shm", True, "", b"boot", b"\0aiotransfer-" + b"0" * 32)], (256, 1 << 22),
                ["10.0.0.1:1", "[fd00::1]:2"])  # fmt: skip
NONCES: dict[str, bytes] = {"dialer": b"d" * 32, "acceptor": b"a" * 32}
NUMBERS = {"dialer": 7, "acceptor": 9}
GRANT = Grant("127.0.0.1:1", 5, 4096, 100, "write", "cpu", 1, 1, 3, 0, (("efa", b"key"),), 9)
REGION = RemoteRegion.of(GRANT)
FRAMES: tuple[Greeting | Frame, ...] = (
    frames.Hello(VERSION, 0, b"n" * 32, "shared"),
    frames.Hello(VERSION, 0, b"n" * 32, "shared", True),
    frames.Welcome(VERSION, 0, b"n" * 32, "file"),
    frames.Proof(b"m" * 32),
    frames.Accepted(b"m" * 32, 7, INFO),
    frames.Info(b"m" * 32, 8, INFO),
    frames.Refused("key", "no"),
    frames.Lookup(1, "name"),
    frames.LookupCancel(1),
    frames.Found(1, REGION.encode()),
    frames.Failed(1, "stale", "gone"),
    frames.Ask(1, "shm", shm_messages.encode(shm_messages.Hello(b"t" * 16))),
    frames.Answer(1, b""),
    frames.Message(b"hello"),
    frames.Credit(64, 1 << 20),
    frames.Ping(1),
    frames.Pong(1),
    frames.Revoked([1, 2], "closed", [3, 5]),
    frames.Goodbye("bye"),
    frames.Up(),
    frames.Merge(),
    frames.Join(b"k" * 16, 1, 2, (0xF000_0000, 0xF000_0001)),
    frames.Roster(b"n" * 8, b"m" * 12),
    frames.Resume(1, 3, b"m" * 32),
    frames.Resumed(4, b"m" * 32),
    frames.Acknowledge(5),
)
_FLAGS = struct.Struct("<H")
T = TypeVar("T")


@dataclass(frozen=True)
class Decoder:
    """`check` is right for any bytes, and True for each of `seeds`."""

    name: str
    what: str
    check: Callable[[bytes], bool]
    seeds: Callable[[], list[bytes]]


def handshake(role: Role) -> Handshake:
    """One side of a handshake that can be repeated byte for byte."""
    return Handshake(role, KEY, NUMBERS[role], INFO, NONCES[role])


def conversation(role: Role, *more: Frame) -> bytes:
    """What that side hears in a good handshake, and then these frames."""
    dialer, acceptor = handshake("dialer"), handshake("acceptor")
    heard = {"dialer": b"", "acceptor": b""}
    while not (dialer.established and acceptor.established):
        for side, speaker, listener in (("acceptor", dialer, acceptor), ("dialer", acceptor, dialer)):
            said = speaker.take_output()
            heard[side] += said
            listener.receive(said)
    return heard[role] + b"".join(map(frames.encode, more))


def _stream(data: bytes) -> bool:
    """Frames of a stream that comes in pieces, whose size is the first byte."""
    reader = FrameReader()
    piece, rest, parsed = data[0] + 1 if data else 1, data[1:], False
    try:
        for at in range(0, len(rest), piece):
            reader.feed(rest[at : at + piece])
            assert len(reader._buffer) <= reader.limit + 4 + len(PREAMBLE) + piece
            while reader.next() is not None:
                parsed = True
    except RendezvousError:
        assert not reader._buffer, "nothing of a stranger is kept"
        return False
    return parsed


def _frame(data: bytes) -> bool:
    """One frame after the handshake: what parses survives being written again."""
    reader = FrameReader()
    reader.limit = MAX_FRAME
    reader.feed(PREAMBLE + len(data).to_bytes(4, "little") + data)
    try:
        frame = reader.next()
    except RendezvousError:
        return False
    assert frame is not None
    again = FrameReader()
    again.limit = MAX_FRAME
    again.feed(PREAMBLE + frames.encode(frame))
    assert again.next() == frame
    return True


def _handshake(role: Role) -> Callable[[bytes], bool]:
    other = handshake("acceptor" if role == "dialer" else "dialer")
    other._theirs = handshake(role)._mine
    proof = KEY.mac(other.role, other._transcript(other.role))

    def check(data: bytes) -> bool:
        mine = handshake(role)
        piece, rest = data[0] + 1 if data else 1, data[1:]
        try:
            for at in range(0, len(rest), piece):
                mine.receive(rest[at : at + piece])
                assert mine.established <= (proof in rest), "opened without the key"
                assert len(mine.take_output()) < 1024, "a stranger is answered with little"
        except RendezvousError:
            assert not mine.established
            assert len(mine.take_output()) < 1024
            return False
        return mine.established

    return check


def _resumption(data: bytes) -> bool:
    """Frames of a connection that resumes, for either side: nothing changes what a ledger keeps without the proof."""
    dialer, acceptor = ReplayLog(b"s" * 32), ReplayLog(b"s" * 32)
    for ledger in (dialer, acceptor):
        for _ in range(4):
            ledger.send(b"kept")
            ledger.receive(4)
    offer = dialer.resume(b"tag")
    good = Resumed(4, dialer._mac("acceptor", b"tag", 1, 4))
    reader, parsed = FrameReader(), False
    reader.limit = MAX_FRAME
    reader.feed(PREAMBLE + data)
    try:
        while (frame := reader.next()) is not None:
            if isinstance(frame, Resume):
                assert acceptor.resumed(frame, b"tag")[0].received == 4
                assert frame == offer, "resumed without the secret"
            elif isinstance(frame, Resumed):
                dialer.go_on(frame, b"tag")
                assert frame == good, "went on without the secret"
            elif isinstance(frame, Acknowledge):
                dialer.acknowledged(frame.received)
            parsed = True
    except RendezvousError:
        parsed = False
    for ledger in (dialer, acceptor):
        assert ledger.kept_bytes == 4 * len(ledger._kept) <= 16
    return parsed


def _resumptions() -> list[bytes]:
    dialer = ReplayLog(b"s" * 32)
    for _ in range(4):
        dialer.send(b"kept")
        dialer.receive(4)
    offer, answer = dialer.resume(b"tag"), Resumed(4, dialer._mac("acceptor", b"tag", 1, 4))
    return [frames.encode(offer), frames.encode(answer), frames.encode(Acknowledge(4)), frames.encode(Acknowledge(1)) * 2]


def _addresses(data: bytes) -> bool:
    """What a peer says of its further addresses: some text, of which only addresses that may lead to another host are taken."""
    told = INFO.__class__("x", "", 1, [], further=data.decode("latin-1").split(","))
    found = further(told)
    assert len(found) <= frames.MOST_FURTHER
    for address in found:
        assert 0 < address.port < 1 << 16
        assert not ipaddress.ip_address(address.host).is_loopback
    return bool(found)


def _region(raw: bytes) -> bool:
    try:
        region = RemoteRegion.decode(raw)
    except DescriptorError:
        return False
    assert 0 <= region._start <= region._start + region.nbytes <= region._grant.nbytes < 1 << 63
    assert 0 <= region.base <= region.base + region.nbytes <= 1 << 64
    assert RemoteRegion.decode(region.encode()) == region
    return True


def _summed(body: bytes) -> bool:
    """A descriptor's body with the checksum that it needs."""
    head = descriptor._HEAD.pack(descriptor.MAGIC, descriptor.VERSION) + body
    return _region(head + zlib.crc32(head).to_bytes(4, "little"))


def _broken(decode: Callable[[bytes], T], holds: Callable[[T], bool] = lambda parsed: True) -> Callable[[bytes], bool]:
    def check(data: bytes) -> bool:
        try:
            parsed = decode(data)
        except BrokenError:
            return False
        assert holds(parsed), f"{parsed} parsed"
        return True

    return check


def _fits(asked: shm_messages.Hello | shm_messages.Fetch) -> bool:
    numbers = (asked.slot, asked.epoch, asked.segment) if isinstance(asked, shm_messages.Fetch) else ()
    tickets = (asked.ticket, asked.channel) if isinstance(asked, shm_messages.Fetch) else (asked.ticket,)
    return all(len(t) == fd_passing.TICKET_BYTES for t in tickets) and all(0 <= n < 1 << 64 for n in numbers)


def _fits_offer(offer: shm_messages.Offer) -> bool:
    return len(offer.control_cookie) == len(offer.channel_cookie) == 16 and 0 <= offer.probe_va < 1 << 64


def _packet(data: bytes) -> bool:
    """A packet; the first two bytes are the flags that the kernel would report."""
    flags = _FLAGS.unpack(data[:2])[0] if len(data) >= 2 else 0
    try:
        ticket, body = fd_passing.parse(data[2:], flags)
    except ConnectionError:
        return False
    assert len(ticket) == fd_passing.TICKET_BYTES
    assert ticket + body == data[2:]
    return True


def _dialogues(role: Role) -> Callable[[], list[bytes]]:
    return lambda: [bytes([n]) + conversation(role, *more) for n in (0, 255) for more in ((), FRAMES[7:13], FRAMES[13:])]


def _kv(data: bytes) -> bool:
    """A KV message, and the layout in it."""
    try:
        message = messages.decode(data)
    except DescriptorError:
        return False
    assert message.number == messages.number(data)
    if isinstance(message, messages.Reserve):
        assert message.skip_tokens <= message.tokens <= messages.MOST_TOKENS
    if isinstance(message, messages.Reserve | messages.Reserved):
        try:
            layout = KVLayout.from_dict(message.layout)
        except (TypeError, ValueError):
            return True
        assert layout.offset + layout.pool_bytes <= MOST_POOL_BYTES
        assert len(receivers(layout, layout)) <= MOST_RANKS
    return True


def _kv_messages() -> list[bytes]:
    layout = KVLayout(4, 2, 8, "bfloat16", 4, 64, tp=2, pp=2, windows=(None, 8, None, 8)).to_dict()
    return [messages.encode(message) for message in (
        messages.Reserve(7, "request", layout, [b"pool"], b"tail", bytes(24), 12, 4, 5, 0, 1.5, True, b"prompt", "instance"),
        messages.Reserved(7, layout), messages.Refused(7, "layout", "they differ", "windows", [None, 8], 3),
        messages.Cancel(7, "late", "why"), messages.Failed(7, "nan", True), messages.Waiting(7, "others"),
        messages.Absent(7, "request", layout, "no memory", "instance"),
    )]  # fmt: skip


DECODERS = (
    Decoder("stream", "control frames in a stream, cut anywhere", _stream,
            lambda: [b"\x1f" + PREAMBLE + b"".join(map(frames.encode, FRAMES[i : i + 4])) for i in range(0, len(FRAMES), 4)]),
    Decoder("frame", "one control frame", _frame, lambda: [frames.encode(frame)[4:] for frame in FRAMES]),
    Decoder("acceptor", "the greeting, on the side that was dialed", _handshake("acceptor"), _dialogues("acceptor")),
    Decoder("dialer", "the greeting, on the side that dialed", _handshake("dialer"), _dialogues("dialer")),
    Decoder("resumption", "the first frames of a connection that resumes, and acknowledgements", _resumption, _resumptions),
    Decoder("addresses", "a peer's further control addresses", _addresses,
            lambda: [b"10.0.0.1:1", b"[fd00::1]:2,127.0.0.1:3,10.0.0.2:4"]),
    Decoder("descriptor", "`RemoteRegion.decode`", _region, lambda: [REGION.encode(), REGION[10:20].encode()]),
    Decoder("grant", "the same behind a good checksum", _summed, lambda: [REGION.encode()[5:-4], REGION[10:20].encode()[5:-4]]),
    Decoder("shm question", "what a peer asks the shm provider", _broken(shm_messages.question, _fits),
            lambda: [shm_messages.encode(q) for q in (shm_messages.Hello(b"t" * 16),
                                                      shm_messages.Fetch(b"t" * 16, b"c" * 16, 1, 1, 3))]),
    Decoder("shm offer", "what comes with a peer's descriptors", _broken(shm_messages.offer, _fits_offer),
            lambda: [shm_messages.encode(shm_messages.Offer(b"c" * 16, b"d" * 16, 1 << 46))]),
    Decoder("shm size", "the answer to a question for a segment", _broken(shm_messages.size, lambda size: 0 <= size < 1 << 63),
            lambda: [shm_messages.encode(shm_messages.Size(1 << 20))]),
    Decoder("shm name", "the name of a peer's socket", _broken(shm_messages.socket_name),
            lambda: [b"\0aiotransfer-" + b"0a" * 16]),
    Decoder("fabric question", "what a peer asks a fabric provider",
            _broken(lambda data: decode(fabric_messages.questions, data, "question", "tcp")),
            lambda: [fabric_messages.encode(q) for q in (
                fabric_messages.Offer(0, 1, b"a" * 16, 1, 2, 3, 4, 1, 0, "eth0"),
                fabric_messages.KeyRequest(1, 2, 3), fabric_messages.Retire(1, 2),
                fabric_messages.Gather(1, [(2, "eth0"), (3, "eth1")]), fabric_messages.MemberFailed(2, 1, 70),
                fabric_messages.RetireEach(1, [(2, 70), (3, 0)]))]),
    Decoder("fabric key reply", "the answer to a question for a key",
            _broken(lambda data: decode(fabric_messages.key_replies, data, "key reply", "tcp")),
            lambda: [fabric_messages.encode(fabric_messages.KeyReply(1 << 46, 7))]),
    Decoder("fabric key replies", "the same, for several rails",
            _broken(lambda data: decode(fabric_messages.key_replies_each, data, "key reply", "tcp")),
            lambda: [fabric_messages.encode(fabric_messages.KeyReplies([(2, 1 << 46, 7), (3, 0, 8)]))]),
    Decoder("fabric rails", "what a peer says of its rails", _broken(fabric_messages.side),
            lambda: [fabric_messages.encode(fabric_messages.Side([("eth0", "10.0.0.1", 24), ("eth1", "fd00::1", 64)], True))]),
    Decoder("loopback question", "what a peer asks the loopback provider", _broken(loopback.question), lambda: [b""]),
    Decoder("kv message", "what a decode rank and a prefill rank say to each other, and the layout in it", _kv, _kv_messages),
    Decoder("fd packet", "packets of the descriptor channel", _packet,
            lambda: [b"\0\0" + b"t" * 16, b"\0\0" + b"t" * 16 + b"body"]),
)  # fmt: skip
