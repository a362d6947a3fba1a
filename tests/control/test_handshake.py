"""Frames and the handshake: any bytes parse or raise the one error, and only the key opens."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiotransfer.control import frames
from aiotransfer.control.frames import PREAMBLE, VERSION, FrameReader, PeerInfo, Proof, encode
from aiotransfer.control.handshake import Handshake
from aiotransfer.control.key import Key, load_key
from aiotransfer.errors import ConfigurationError, RendezvousError

KEY = Key("shared", b"k" * 32)
INFO = PeerInfo("x", "127.0.0.1:1", 1, [])


def handshake(role: str, key: Key = KEY, number: int = 1, **more: Any) -> Handshake:
    return Handshake(role, key, number, INFO, os.urandom(32), **more)  # type: ignore[arg-type]


def talk(dialer: Handshake, acceptor: Handshake) -> None:
    for _ in range(4):
        acceptor.receive(dialer.take_output())
        dialer.receive(acceptor.take_output())


def test_two_sides_with_one_key_meet() -> None:
    dialer, acceptor = handshake("dialer"), handshake("acceptor", number=2)
    talk(dialer, acceptor)
    assert dialer.established
    assert acceptor.established
    assert (dialer.peer_incarnation, acceptor.peer_incarnation) == (2, 1)


@pytest.mark.parametrize(
    ("mine", "version", "words"),
    [
        (Key("shared", b"x" * 32), VERSION, "different keys"),
        (Key("file", b"k" * 32), VERSION, "key file"),
        (KEY, VERSION - 1, "version"),
    ],
)
def test_wrong_keys_and_versions_are_told_to_both_sides(mine: Key, version: int, words: str) -> None:
    dialer, acceptor = handshake("dialer", mine, version=version), handshake("acceptor", number=2)
    with pytest.raises(RendezvousError, match=words) as first:
        talk(dialer, acceptor)
    with pytest.raises(RendezvousError, match=words):
        (dialer if acceptor.error else acceptor).receive((acceptor if acceptor.error else dialer).take_output())
    assert first.value.hint
    assert not dialer.established
    assert not acceptor.established


def test_who_resumes_says_so_and_cannot_be_made_to() -> None:
    """The proofs cover it: whoever changes it on the way ends the handshake."""
    dialer, acceptor = handshake("dialer", resumes=True), handshake("acceptor", number=2)
    talk(dialer, acceptor)
    assert acceptor.established
    assert acceptor.resumes
    assert dialer.tag("resume") == acceptor.tag("resume") != dialer.tag("session") == acceptor.tag("session")
    again, other = handshake("dialer", resumes=True), handshake("acceptor", number=2)
    talk(again, other)
    assert again.tag("resume") != dialer.tag("resume"), "each connection has its own"
    for truth in (True, False):
        dialer, acceptor = handshake("dialer", resumes=truth), handshake("acceptor", number=2)
        dialer.take_output()
        acceptor.receive(PREAMBLE + encode(frames.Hello(VERSION, 0, dialer._mine[2], "shared", not truth)))
        dialer.receive(acceptor.take_output())
        with pytest.raises(RendezvousError, match="keys"):
            acceptor.receive(dialer.take_output())


def test_a_stranger_learns_nothing_before_its_proof() -> None:
    acceptor = handshake("acceptor")
    acceptor.receive(PREAMBLE + encode(frames.Hello(VERSION, 0, b"n" * 32, "shared")))
    assert INFO.address.encode() not in acceptor.take_output()


def test_a_proof_can_neither_be_replayed_nor_reflected() -> None:
    dialer, acceptor = handshake("dialer"), handshake("acceptor", number=2)
    acceptor.receive(dialer.take_output())
    dialer.receive(acceptor.take_output())
    proof = dialer.take_output()
    other = handshake("acceptor", number=3)
    other.receive(PREAMBLE + encode(frames.Hello(VERSION, 0, b"n" * 32, "shared")))
    with pytest.raises(RendezvousError):
        other.receive(proof)
    mirror = handshake("dialer", number=2)
    mirror.receive(PREAMBLE + encode(frames.Welcome(VERSION, 0, b"n" * 32, "shared")))
    mac = proof[-32:]
    with pytest.raises(RendezvousError):
        mirror.receive(encode(frames.Accepted(mac, 1, INFO)))


@pytest.mark.parametrize("teller", ["dialer", "acceptor"])
def test_a_stranger_learns_nothing_of_an_engine_before_the_proof(teller: str) -> None:
    """Neither by dialling it nor by being dialled."""
    number = 0x1122334455667788
    dialer = handshake("dialer", number=number if teller == "dialer" else 1)
    acceptor = handshake("acceptor", number=number if teller == "acceptor" else 2)
    said = {"dialer": b"", "acceptor": b""}
    while not (dialer if teller == "acceptor" else acceptor).established:
        assert number.to_bytes(8, "big") not in said[teller], "told before the other side's proof was checked"
        assert INFO.address.encode() not in said[teller]
        said["dialer"] = dialer.take_output()
        acceptor.receive(said["dialer"])
        said["acceptor"] = b"" if dialer.established or acceptor.established else acceptor.take_output()
        dialer.receive(said["acceptor"])
    assert number.to_bytes(8, "big") in said[teller], "told with the last proof"
    assert number in (dialer.peer_incarnation, acceptor.peer_incarnation)


def test_an_engine_that_dials_a_stranger_tells_it_nothing() -> None:
    """The stranger answers as an engine does, but cannot prove that it has the key."""
    number = 0x1122334455667788
    dialer = handshake("dialer", number=number)
    said = dialer.take_output()
    dialer.receive(PREAMBLE + encode(frames.Welcome(VERSION, 0, b"n" * 32, "shared")))
    said += dialer.take_output()
    with pytest.raises(RendezvousError, match="keys"):
        dialer.receive(encode(frames.Accepted(b"m" * 32, 7, INFO)))
    said += dialer.take_output()
    assert number.to_bytes(8, "big") not in said
    assert INFO.address.encode() not in said


@pytest.mark.parametrize("changed", [3, -1, 1 << 63])
@pytest.mark.parametrize("teller", ["dialer", "acceptor"])
def test_a_proof_covers_the_incarnation_that_is_told_with_it(teller: str, changed: int) -> None:
    dialer, acceptor = handshake("dialer"), handshake("acceptor", number=2)
    acceptor.receive(dialer.take_output())
    dialer.receive(acceptor.take_output())
    acceptor.receive(dialer.take_output())
    said, hears = acceptor.take_output(), dialer
    if teller == "dialer":
        dialer.receive(said)
        said, hears = dialer.take_output(), acceptor
    reader = FrameReader()
    reader.feed(PREAMBLE + said)
    frame = reader.next()
    assert isinstance(frame, frames.Accepted | frames.Info)
    frame.incarnation = changed
    with pytest.raises(RendezvousError):
        hears.receive(encode(frame))
    assert not hears.established
    assert hears.peer_incarnation == 0


def test_the_dialers_first_proof_is_not_its_last() -> None:
    dialer, acceptor = handshake("dialer"), handshake("acceptor", number=2)
    acceptor.receive(dialer.take_output())
    dialer.receive(acceptor.take_output())
    proof = dialer.take_output()
    acceptor.receive(proof)
    with pytest.raises(RendezvousError, match="keys"):
        acceptor.receive(encode(frames.Info(proof[-32:], 1, INFO)))


@pytest.mark.parametrize(
    "frame", [Proof(b"m" * 32), frames.Info(b"m" * 32, 1, INFO), frames.Up(), frames.Message(b"x"), frames.Ping(1)]
)
def test_frames_out_of_turn_end_the_handshake(frame: frames.Frame) -> None:
    acceptor = handshake("acceptor")
    with pytest.raises(RendezvousError, match="out of turn"):
        acceptor.receive(PREAMBLE + encode(frame))
    with pytest.raises(RendezvousError):
        acceptor.receive(b"")


@given(st.binary(max_size=400), st.integers(1, 50))
def test_any_bytes_parse_or_raise_the_one_error(data: bytes, piece: int) -> None:
    for stream in (data, PREAMBLE + data, PREAMBLE + len(data).to_bytes(4, "little") + data):
        reader = FrameReader()
        try:
            for i in range(0, len(stream), piece):
                reader.feed(stream[i : i + piece])
                while reader.next() is not None:
                    pass
        except RendezvousError:
            with pytest.raises(RendezvousError):
                reader.next()


@given(st.binary(max_size=200), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=5), st.booleans())
def test_damaged_bytes_never_open_with_the_wrong_key(data: bytes, flips: list[tuple[int, int]], append: bool) -> None:
    dialer, acceptor = handshake("dialer", Key("shared", b"w" * 32)), handshake("acceptor", number=2)
    try:
        for _ in range(4):
            stream = bytearray(dialer.take_output() + (data if append else b""))
            for at, value in flips:
                if at < len(stream):
                    stream[at] ^= value
            acceptor.receive(bytes(stream))
            dialer.receive(acceptor.take_output())
    except RendezvousError:
        pass
    assert not acceptor.established


def test_a_giant_frame_is_refused_by_its_length_alone() -> None:
    reader = FrameReader()
    reader.feed(PREAMBLE + (1 << 30).to_bytes(4, "little"))
    with pytest.raises(RendezvousError, match="1073741824 bytes"):
        reader.next()


def test_a_web_browser_is_told_apart_by_its_first_bytes() -> None:
    reader = FrameReader()
    reader.feed(b"GET / HTTP/1.1\r\n")
    with pytest.raises(RendezvousError, match="does not speak this protocol"):
        reader.next()


def test_the_key_file_is_private_and_shared_by_all_processes_of_the_user(tmp_path: Path) -> None:
    environ = {"XDG_RUNTIME_DIR": str(tmp_path)}
    first, second = load_key(None, environ), load_key(None, environ)
    assert second.verify("dialer", b"t", first.mac("dialer", b"t"))
    assert stat.S_IMODE((tmp_path / "aiotransfer" / "key").stat().st_mode) == 0o600


@pytest.mark.parametrize("spoil", ["mode", "size", "link", "directory"])
def test_a_key_file_that_others_may_have_touched_is_refused(tmp_path: Path, spoil: str) -> None:
    environ = {"XDG_RUNTIME_DIR": str(tmp_path)}
    load_key(None, environ)
    file = tmp_path / "aiotransfer" / "key"
    if spoil == "mode":
        file.chmod(0o644)
    elif spoil == "size":
        file.write_bytes(b"short")
    elif spoil == "link":
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    else:
        file.parent.chmod(0o755)
    with pytest.raises(ConfigurationError, match="cannot be trusted") as caught:
        load_key(None, environ)
    assert caught.value.hint


def test_short_or_strange_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 16"):
        load_key(b"short", {})
    with pytest.raises(TypeError):
        load_key(5, {})  # type: ignore[arg-type]
    assert load_key(None, {"AIOTRANSFER_KEY": "a long enough secret"}).kind == "shared"
