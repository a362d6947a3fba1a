"""The handshake as a state machine: bytes in, bytes out, no I/O.

    dialer                          acceptor
    Hello(nonce)            ->
                            <-       Welcome(nonce)
    Proof(mac)              ->       checks it: a stranger learns nothing about this engine
                            <-       Accepted(mac, incarnation, info)
    checks it
    Info(mac, incarnation, info) ->  checks it

Neither side tells its incarnation before the other has proved that it has the key: a dialer may have been led
to a stranger. Each of the three proofs covers both nonces, the version, whether a conversation is resumed,
which proof it is, and the incarnations that have been told by then, so that it can neither be replayed nor
reflected. What each state accepts stands in one table; anything else is the peer's fault and ends the
handshake, and nothing a stranger sends is kept beyond one small frame.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from aiotransfer.control.frames import (
    MAX_FRAME,
    PREAMBLE,
    VERSION,
    Accepted,
    Frame,
    FrameReader,
    Greeting,
    Hello,
    Info,
    PeerInfo,
    Proof,
    Refused,
    Welcome,
    clip,
    encode,
)
from aiotransfer.control.key import Key
from aiotransfer.errors import RendezvousError

NONCE_BYTES = 32
Role = Literal["dialer", "acceptor"]
Proving = Literal["dialer", "acceptor", "dialer tells"]  # the three proofs, in the order in which they are sent

_EXPECTED: dict[str, type[Greeting]] = {
    "await hello": Hello,
    "await welcome": Welcome,
    "await proof": Proof,
    "await accepted": Accepted,
    "await info": Info,
}


class Handshake:
    """One side of a handshake. `take_output` after construction and after every `receive`."""

    def __init__(
        self, role: Role, key: Key, incarnation: int, info: PeerInfo | Callable[[], PeerInfo], nonce: bytes,
        version: int = VERSION, *, resumes: bool = False,
    ) -> None:  # fmt: skip
        if len(nonce) != NONCE_BYTES:
            raise ValueError(f"a nonce has {NONCE_BYTES} bytes, not {len(nonce)}")
        self.role: Role = role
        self._key = key
        self._mine = (version, incarnation, nonce)
        self._theirs = (0, 0, b"")
        self._info = info  # made when it is told: a stranger is not worth it
        self.resumes = resumes  # a conversation between these two, which has lost its connection; what the dialer says
        self._reader = FrameReader()
        self._output = bytearray(PREAMBLE)
        self.state = "await hello" if role == "acceptor" else "await welcome"
        self.peer_incarnation = 0
        self.peer_info: PeerInfo | None = None
        self.error: RendezvousError | None = None
        if role == "dialer":
            self._send(Hello(version, 0, nonce, key.kind, resumes))

    @property
    def info(self) -> PeerInfo:
        """What this side says of itself."""
        if callable(self._info):
            self._info = self._info()
        return self._info

    @property
    def established(self) -> bool:
        """Whether both sides have proved that they have the key."""
        return self.state == "established"

    @property
    def proven(self) -> bool:
        """The other side has shown that it has the key."""
        return self.state in ("await info", "established")

    def take_output(self) -> bytes:
        """Take the bytes that must be sent now."""
        data = bytes(self._output)
        self._output.clear()
        return data

    def receive(self, data: bytes) -> list[Frame]:
        """Feed received bytes. Frames that follow the handshake are returned; raises `RendezvousError`, for
        good.

        Send `take_output()` also after an error: it may hold the reason for the other side.
        """
        if self.error is not None:
            raise self.error
        self._reader.feed(data)
        frames: list[Frame] = []
        try:
            while (frame := self._reader.next()) is not None:
                if self.state == "established":
                    if isinstance(frame, Greeting):
                        raise RendezvousError("the other side began another handshake")
                    frames.append(frame)
                else:
                    self._greet(frame)
        except RendezvousError as error:
            self.state = "failed"
            self.error = error
            raise
        return frames

    def _send(self, frame: Greeting) -> None:
        self._output += encode(frame)

    def _refuse(self, code: str, text: str, hint: str) -> RendezvousError:
        self._send(Refused(code, text))
        ours = f"; this side's key: {self._key.source}" if code == "key" and self._key.source else ""  # no stranger's business
        return RendezvousError(text + ours, hint=hint)

    def _transcript(self, proof: Proving = "dialer tells") -> bytes:
        """What this proof covers. The acceptor tells its incarnation with the second one, and the dialer with
        the last."""
        dialer, acceptor = (self._mine, self._theirs) if self.role == "dialer" else (self._theirs, self._mine)
        if proof != "dialer tells":
            dialer = (dialer[0], 0, dialer[2])
        if proof == "dialer":
            acceptor = (acceptor[0], 0, acceptor[2])
        parts = [n.to_bytes(8, "little") + i.to_bytes(8, "little") + nonce for n, i, nonce in (dialer, acceptor)]
        return b"".join(parts) + (b"resumes" if self.resumes else b"")

    def tag(self, use: Literal["session", "resume"]) -> bytes:
        """A secret that only the two sides of this handshake can know, and a holder of the key that has heard
        them."""
        return self._key.mac(use, self._transcript())

    def _greet(self, frame: Greeting | Frame) -> None:
        if isinstance(frame, Refused):
            ours = f"; this side's key: {self._key.source}" if frame.code == "key" and self._key.source else ""
            raise RendezvousError(f"the other side refused: {clip(frame.text)}{ours}", hint=_HINTS.get(frame.code))
        if type(frame) is not _EXPECTED[self.state]:
            raise self._refuse("protocol", f"{type(frame).__name__} is out of turn", _HINTS["protocol"])
        if isinstance(frame, (Hello, Welcome)):
            self._introduce(frame)
        elif isinstance(frame, Proof):
            self._check("dialer", frame.mac)
            self._send(Accepted(self._prove("acceptor"), self._mine[1], self.info))
            self.state = "await info"
        elif isinstance(frame, Accepted):
            self._told("acceptor", frame)
            self._send(Info(self._prove("dialer tells"), self._mine[1], self.info))
            self._establish(frame.info)
        elif isinstance(frame, Info):
            self._told("dialer tells", frame)
            self._establish(frame.info)

    def _introduce(self, frame: Hello | Welcome) -> None:
        version = self._mine[0]
        if frame.version != version:
            raise self._refuse("version", f"one side speaks version {frame.version}, the other {version}", _HINTS["version"])
        if len(frame.nonce) != NONCE_BYTES:
            raise self._refuse("protocol", "the greeting is malformed", _HINTS["protocol"])
        if frame.key_kind != self._key.kind:
            raise self._refuse(
                "key",
                "authentication failed: one side has a shared key, the other only its user's key file",
                _HINTS["key"],
            )
        self._theirs = (frame.version, 0, frame.nonce)
        if isinstance(frame, Hello):
            self.resumes = frame.resumes
            self._send(Welcome(version, 0, self._mine[2], self._key.kind))
            self.state = "await proof"
        else:
            self._send(Proof(self._prove("dialer")))
            self.state = "await accepted"

    def _told(self, proof: Proving, frame: Accepted | Info) -> None:
        """The other side's incarnation, with its proof."""
        if not 0 <= frame.incarnation < 1 << 64:
            raise self._refuse("protocol", "the greeting is malformed", _HINTS["protocol"])
        version, _, nonce = self._theirs
        self._theirs = (version, frame.incarnation, nonce)
        self._check(proof, frame.mac)
        self.peer_incarnation = frame.incarnation

    def _prove(self, proof: Proving) -> bytes:
        return self._key.mac(proof, self._transcript(proof))

    def _check(self, proof: Proving, mac: bytes) -> None:
        if not self._key.verify(proof, self._transcript(proof), mac):
            raise self._refuse("key", "authentication failed: the two sides have different keys", _HINTS["key"])

    def _establish(self, info: PeerInfo) -> None:
        self.peer_info = info
        self._reader.limit = MAX_FRAME
        self.state = "established"


_HINTS = {
    "key": "give both engines the same key=... (or AIOTRANSFER_KEY), or run both as the same user on one host, with the same "
    "XDG_RUNTIME_DIR (or temporary directory), which chooses the key file",
    "version": "use one version of aiotransfer on both sides",
    "protocol": "is this the control port of an aiotransfer engine?",
}
