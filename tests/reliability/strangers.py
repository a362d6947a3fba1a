"""Friends still get in: engines that connect while strangers crowd the control port, the descriptor socket and the data ports.

    python -m tests.reliability.strangers                        (`make strangers`: writes docs/reliability/strangers.md)
    python -m tests.reliability.strangers --only silent --friends 20

One engine in a process of its own, strangers without its key in another one (of another user, where this may be chosen),
friends one after the other from here. Each kind of stranger holds so many connections all the time, and dials again when one
ends:

silent    says nothing, until it is dropped
slow      says the preamble byte by byte, and hangs up just before half a second
greeting  says a good Hello, and then nothing
redial    connects and hangs up 20 ms later
socket    the same at the socket that passes descriptors, with two descriptors each time
byte      at the data ports of tcp, which are known here: connects to one after the other, says a byte, and waits
request   the same, but says what libfabric takes for the request of a peer
all       a share of each of the first five
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import itertools
import os
import random
import selectors
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import aiotransfer as at
from aiotransfer.control.frames import PREAMBLE, VERSION, Hello, encode
from tests.reliability.reports import publish

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "docs" / "reliability" / "strangers.md"
KINDS = ("silent", "slow", "greeting", "redial", "socket")
AT_DATA_PORTS = ("byte", "request")
HOLD = {"slow": 0.45, "redial": 0.02, "socket": 0.02, "byte": 2.0, "request": 2.0}  # seconds until it hangs up by itself
DATA_PORTS = (22100, 22131)  # of the engine that is dialled
NOBODY = 65534
TIMEOUT = 30.0  # of a friend: the default of an engine


class Outcome(NamedTuple):
    """Of the friends that met one kind of stranger."""

    kind: str
    strangers: int
    friends: int
    paths: dict[str, int]
    failures: list[str]
    seconds: list[float]
    descriptors: tuple[int, int]  # of the engine that is dialled: before the first friend, and the most that were seen

    @property
    def came_in(self) -> int:
        """How many."""
        return sum(self.paths.values())


def request(port: int) -> bytes:
    """What libfabric's tcp (1.17 to 2.5) takes for a request to connect, from the endpoint at this port of the sender's host."""
    header = bytes([3, 0]) + (8).to_bytes(2, "big") + bytes(20) + (1).to_bytes(8, "little")
    return header + bytes([1, 0]) + port.to_bytes(2, "big") + os.getpid().to_bytes(4, "big")


def victim(providers: str) -> None:
    """An engine that says where it is, and then does nothing."""

    async def main() -> None:
        config = at.Config(data_ports="{}-{}".format(*DATA_PORTS) if providers == "tcp" else "")
        async with at.open_engine(providers=providers, config=config) as engine:
            name = next((t.data.decode() for t in engine._offers() if t.provider == "shm"), "")
            print(engine.address, name.lstrip("\0"), flush=True)
            await asyncio.sleep(3600)

    asyncio.run(main())


class _Crowd:
    """All strangers, in one process."""

    def __init__(self, address: str, name: str, counts: dict[str, int]) -> None:
        host, _, port = address.rpartition(":")
        self._control, self._name = (host, int(port)), "\0" + name
        self._wanted = counts
        self._lives: dict[str, dict[socket.socket, float]] = {kind: {} for kind in counts}
        self._ports = itertools.cycle(range(DATA_PORTS[0], DATA_PORTS[1] + 1))
        self._looks = selectors.DefaultSelector()
        self._pipe = os.pipe()

    def run(self) -> None:
        """Until this process is ended."""
        while True:
            for kind, count in self._wanted.items():
                for _ in range(count - len(self._lives[kind])):
                    if not self._dial(kind) and kind not in AT_DATA_PORTS:
                        break
            for key, _ in self._looks.select(0.002):
                self._heard(key.data, key.fileobj)  # type: ignore[arg-type]
            now = time.monotonic()
            for kind, seconds in HOLD.items():
                for sock in [s for s, begun in self._lives.get(kind, {}).items() if now - begun > seconds]:
                    self._end(kind, sock)

    def _dial(self, kind: str) -> bool:
        at_socket = kind == "socket"
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) if at_socket else socket.socket()
        sock.setblocking(False)
        try:
            at_port = (self._control[0], next(self._ports)) if kind in AT_DATA_PORTS else self._control
            sock.connect(self._name if at_socket else at_port)
        except BlockingIOError:
            if at_socket:  # its queue is full, which is what this kind wants
                sock.close()
                return False
        except OSError:
            sock.close()
            return False
        self._lives[kind][sock] = time.monotonic()
        self._looks.register(sock, selectors.EVENT_READ | selectors.EVENT_WRITE, kind)
        return True

    def _heard(self, kind: str, sock: socket.socket) -> None:
        """It stands, or something came, or it has ended. Each says its words once."""
        try:
            if kind == "socket":
                socket.send_fds(sock, [os.urandom(16)], list(self._pipe))
            elif kind == "slow":
                sock.send(PREAMBLE[:1])
            elif kind in AT_DATA_PORTS:
                if self._looks.get_key(sock).events & selectors.EVENT_WRITE:
                    sock.send(b"x" if kind == "byte" else request(random.randrange(1024, 1 << 16)))
            elif kind == "greeting":
                sock.send(PREAMBLE + encode(Hello(VERSION, 0, os.urandom(32), "file")))
            if self._looks.get_key(sock).events & selectors.EVENT_WRITE:
                self._looks.modify(sock, selectors.EVENT_READ, kind)
            elif sock.recv(4096) == b"":
                self._end(kind, sock)
        except BlockingIOError:
            pass
        except OSError:
            self._end(kind, sock)

    def _end(self, kind: str, sock: socket.socket) -> None:
        if self._lives[kind].pop(sock, None) is not None:
            self._looks.unregister(sock)
            sock.close()


async def friends(address: str, count: int, kind: str, strangers: int, pid: int) -> Outcome:
    """So many engines, one after the other, to the one in process `pid`."""
    paths: collections.Counter[str] = collections.Counter()
    failures, seconds = [], []
    held = [_descriptors(pid)]
    for _ in range(count):
        async with at.open_engine(providers=_providers(kind)) as engine:
            begun = time.monotonic()
            try:
                peer = await engine.connect(address, timeout=TIMEOUT)
                await peer.ping()
                paths[peer.path.provider] += 1
            except at.TransferError as error:
                failures.append(f"{type(error).__name__}: {error.message}")
            seconds.append(time.monotonic() - begun)
            held.append(_descriptors(pid))
    return Outcome(kind, strangers, count, dict(paths), failures, sorted(seconds), (held[0], max(held)))


def _descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def _providers(kind: str) -> str:
    return "tcp" if kind in AT_DATA_PORTS else "auto"


def try_out(kind: str, strangers: int, count: int) -> Outcome:
    """One engine, its strangers and its friends."""

    def start(*arguments: str, **options: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-W", "ignore", "-m", "tests.reliability.strangers", *arguments]
        return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, **options)  # type: ignore[call-overload,no-any-return]

    processes = [start("--be", "victim", _providers(kind))]
    try:
        assert processes[0].stdout is not None
        address, *name = processes[0].stdout.readline().split()
        kinds = KINDS if kind == "all" else (kind,)
        counts = [f"{one}={strangers // len(kinds)}" for one in kinds]
        processes.append(start("--be", "strangers", address, *(name or ["-"]), *counts))
        assert processes[1].stdout is not None
        processes[1].stdout.readline()
        return asyncio.run(friends(address, count, kind, strangers, processes[0].pid))
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def report(outcomes: list[Outcome]) -> str:
    """A page of the documentation."""
    rows = "\n".join(
        f"| {o.kind} | {o.strangers} | {o.came_in} of {o.friends} | {', '.join(f'{n} by {p}' for p, n in o.paths.items())} "
        f"| {statistics.median(o.seconds) * 1e3:.0f} ms | {o.seconds[-1]:.2f} s | {o.descriptors[0]}, {o.descriptors[1]} |"
        for o in outcomes
    )
    return f"""# Friends past strangers

Written by `make strangers` (`python -m tests.reliability.strangers --report`) on {os.cpu_count()} processor(s).

Strangers without the key hold so many connections to the control port (and to the socket that passes descriptors) of one engine
all the time, and dial again as soon as one ends; friends connect one after the other. An engine keeps at most 128 unproven
connections at its control port and 64 at that socket, and one at random makes room; a friend that was dropped dials again until
its deadline ({TIMEOUT:g} s here, the default), and takes the next path where one stays crowded.

"byte" and "request" are at the data ports of tcp, which strangers know only where `Config(data_ports=)` fixes them. Such a port
lets connections in from when it is offered to a peer until that peer is there; the kernel refuses all others.

| strangers | connections | friends that came in | paths | median | slowest | descriptors of the engine, at first and at most |
|---|--:|--:|---|--:|--:|--:|
{rows}
"""


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="tests.reliability.strangers")
    parser.add_argument("--strangers", type=int, default=500, help="connections that they hold")
    parser.add_argument("--friends", type=int, default=100)
    parser.add_argument("--only", choices=(*KINDS, *AT_DATA_PORTS, "all"), help="one kind")
    parser.add_argument("--report", action="store_true", help=f"write {REPORT.name} into the documentation")
    parser.add_argument("--be", help=argparse.SUPPRESS)
    parser.add_argument("more", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.be == "victim":
        victim(arguments.more[0])
    elif arguments.be == "strangers":
        if os.getuid() == 0:
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        counts = {kind: int(n) for kind, _, n in (text.partition("=") for text in arguments.more[2:])}
        print("here", flush=True)
        _Crowd(arguments.more[0], arguments.more[1], counts).run()
    outcomes = []
    for kind in (*KINDS, *AT_DATA_PORTS, "all") if arguments.only is None else (arguments.only,):
        outcomes.append(try_out(kind, arguments.strangers, arguments.friends))
        print(outcomes[-1]._replace(seconds=outcomes[-1].seconds[-3:]), flush=True)
    publish(REPORT, report(outcomes), write=arguments.report)
    return 0 if all(outcome.came_in == outcome.friends for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
