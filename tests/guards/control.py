"""Guards of control connections, rendezvous and registries."""

from __future__ import annotations

from tests.guards.mutant import Mutant

GUARDS = (
    Mutant(
        "addresses: a silent one holds nothing up", "aiotransfer/control/dialer.py", "timeout=STAGGER if more else None",
        "timeout=None", "tests/engine/test_addresses.py",
    ),
    Mutant(
        "authentication", "aiotransfer/control/key.py",
        "return hmac.compare_digest(self.mac(role, transcript), mac)", "return True",
        "tests/control/test_handshake.py tests/engine/test_peers.py",
    ),
    Mutant(
        "resume: only with the session's secret", "aiotransfer/control/resume.py",
        '        self._verify("dialer", tag, frame.attempt, frame.received, frame.mac)\n', "", "tests/control/test_resume.py",
    ),
    Mutant(
        "resume: only the acceptor's own answer", "aiotransfer/control/resume.py",
        '        self._verify("acceptor", tag, self._attempt, frame.received, frame.mac)\n', "", "tests/control/test_resume.py",
    ),
    Mutant(
        "resume: not an attempt that was overtaken", "aiotransfer/control/resume.py", "if frame.attempt <= self._attempt:",
        "if False:", "tests/control/test_resume.py",
    ),
    Mutant(
        "resume: what had come is not sent again", "aiotransfer/control/resume.py", "for _ in range(received - least):",
        "for _ in range(received - least - 1):", "tests/control/test_resume.py",
    ),
    Mutant(
        "resume: the old connection is not heard", "aiotransfer/control/channel.py", "        self.link.mute()\n", "",
        "tests/engine/test_reconnect.py",
    ),
    Mutant(
        "connecting: without retry a refusal is the end", "aiotransfer/control/dialer.py", "if not retry and not ours:",
        "if False:", "tests/engine/test_connecting.py",
    ),
    Mutant(
        "resume: not by another incarnation", "aiotransfer/control/dialer.py", "if incarnation != link.incarnation:",
        "if False:", "tests/engine/test_reconnect.py",
    ),
    Mutant(
        "a passphrase is stretched", "aiotransfer/control/key.py",
        "    if _GENERATED.fullmatch(secret):\n", "    if secret:\n", "tests/control/test_key_file.py",
    ),
    Mutant(
        "a place that another user has taken", "aiotransfer/control/key.py",
        "if owner in (None, os.getuid()):", "if owner is not None or owner is None:", "tests/control/test_key_file.py",
    ),
    Mutant(
        "registry: only files of this user are entries", "aiotransfer/kv/registry/file.py",
        "            if status.st_uid != self._owner():\n", "            if status.st_uid < 0:\n",
        "tests/kv/registry/test_file.py",
    ),
    Mutant(
        "one at random makes room: control", "aiotransfer/control/listener.py",
        "one = strangers[int(self._identity.chance() * len(strangers))]", "one = strangers[0]",
        "tests/control/test_hostile_limits.py",
    ),
    Mutant(
        "who has shown the key is no stranger", "aiotransfer/control/handshake.py",
        "return self.state in (\"await info\", \"established\")", "return self.state == \"established\"",
        "tests/control/test_hostile_limits.py",
    ),
    Mutant(
        "an incarnation is told after the proof, and covered", "aiotransfer/control/handshake.py",
        "        self._theirs = (version, frame.incarnation, nonce)\n", "        self._theirs = (version, 2, nonce)\n",
        "tests/control/test_handshake.py",
    ),
    Mutant(
        "a dialer tells its incarnation after the other side's proof", "aiotransfer/control/handshake.py",
        "Hello(version, 0, nonce, key.kind, resumes)", "Hello(version, incarnation, nonce, key.kind, resumes)",
        "tests/control/test_handshake.py",
    ),
    Mutant(
        "a refusal is told by the store", "aiotransfer/rendezvous/connect.py",
        "        await caller.set(keys.refused, b\"%d\" % rank)\n", "", "tests/rendezvous/test_meeting.py",
    ),
    Mutant(
        "a refusal of an earlier start is none", "aiotransfer/rendezvous/connect.py",
        "if await caller.have([told]) and await caller.get_all([told]) == [entry]:", "if False:",
        "tests/rendezvous/test_meeting.py",
    ),
    Mutant(
        "names are looked up before they are dialled", "aiotransfer/rendezvous/environment.py",
        "                found = await loop.getaddrinfo(",
        "                await asyncio.open_connection(launch.host, 4)\n                found = await loop.getaddrinfo(",
        "tests/control/test_names.py",
    ),
)  # fmt: skip
