"""The fault matrix: every fault x operation x struck side, on every provider; what the other side sees, and how soon.

    python -m tests.reliability.matrix --report                        all of it (`make test-matrix`)
    python -m tests.reliability.matrix --cell shm stopped write here   one cell again

Two engines repeat an operation; `here` begins it, `there` is its target. A fault strikes one of them in the middle. Of the
other, the survivor, each cell asserts the type of its error (or that it goes on), the time until then, that the counts lie
between what was done and what was begun, that no byte changes in its memory once it was told, and that it can do the same
operation with a third engine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import aiotransfer as at
from aiotransfer.testing.fabric import Fabric, fabric
from tests.hosts.net import KEY, Hosts
from tests.reliability import verbs
from tests.reliability.party import CONFIG, OPERATIONS, POISON, SLOWNESS, UNITS, Party
from tests.reliability.reports import publish

REPORT = Path(__file__).resolve().parents[2] / "docs" / "reliability" / "matrix.md"
SIDES = ("here", "there")
LOCAL = (
    "cancel", "deadline", "engine closed", "peer closed", "regions closed", "lease revoked", "control cut", "garbage",
    "wrong arguments",
)  # fmt: skip
FAULTS = {
    "loopback": ("killed", "stopped", "paused", "restarted", *LOCAL, "path cut", "bad weather"),
    "shm": ("killed", "stopped", "paused", "restarted", *LOCAL, "loop blocked"),
    "tcp": (
        "killed", "stopped", "paused", "restarted", *LOCAL, "loop blocked",
        "cable cut", "one-way cut", "address gone", "path broken",
    ),
    "verbs": ("killed", "stopped", "paused", "restarted", *LOCAL, "loop blocked", "port down", "path broken"),
}  # fmt: skip
HERE = ("loopback", "shm", "tcp")  # what any machine has: verbs are tested in the guest
SILENT = ("stopped", "cable cut", "one-way cut", "address gone", "port down")  # nothing says that it is gone
PAUSE, BLOCK, TIMEOUT = 0.2 * SLOWNESS, 0.8 * SLOWNESS, 2.0 * SLOWNESS
# Seconds within which the news of a death or a goodbye comes.
SOON = {"loopback": 0.05, "shm": 0.3, "tcp": 0.3, "verbs": 0.5 * SLOWNESS}
TRANSFERS = ("write", "pages", "scatter", "read")


HEAD = """# Fault matrix

Written by `make test-matrix`: {cells} cells in {seconds:.0f} s. Each fault strikes one of two engines that repeat an operation; a
cell says what the *other* one sees and how soon, struck side *here* (the one that begins the operation) / *there* (its target).
Every cell has also passed: counts between done and begun, no late byte, and the operation works with a third engine.
`peer_timeout` is {peer_timeout:g} s, `drain_timeout` {drain_timeout:g} s; times of loopback are virtual. One cell again:
`python -m tests.reliability.matrix --cell shm stopped write here`. "struck" says how many cells a fault was struck in.
"""


@dataclass
class Outcome:
    """What the survivor saw."""

    errors: list[str] = field(default_factory=list)
    seconds: float = 0.0
    quarantined: bool = False

    def __str__(self) -> str:
        if not self.errors:
            return "goes on"
        return f"{self.errors[0]} {self.seconds * 1e3:.0f} ms" + (", quarantined" if self.quarantined else "")


def expected(provider: str, fault: str, operation: str, side: str) -> set[str]:
    """The errors that the survivor may see; empty: it goes on."""
    if fault == "stopped" and provider == "shm" and side == "there" and operation in (*TRANSFERS, "signal"):
        return {"goes on"}  # one-sided: its memory is there, and nothing waits for the process
    if fault == "port down" and operation in ("message", "lookup"):
        return {"PeerLostError", "goes on"}  # the control connection has another way
    if fault in ("killed", "restarted", *SILENT):
        return {"PeerLostError"}
    if fault in ("engine closed", "peer closed", "control cut", "garbage"):
        # Who closes, or gives a peer up, also takes its memory back; a write may meet either first.
        return {"PeerLostError", "StaleRegionError"} if side == "there" and operation in TRANSFERS else {"PeerLostError"}
    if fault in ("regions closed", "lease revoked") and side == "there" and operation in TRANSFERS:
        return {"StaleRegionError"}
    if fault in ("cancel", "deadline") and operation == "barrier":
        return {
            "BrokenError",
            "TransferTimeout",
        }  # the member that gave up says so; between two barriers it had nothing to give up
    if fault == "path cut" and operation == "barrier":
        return {"TransferTimeout", "RailBrokenError", "BrokenError", "goes on"}  # whoever meets it first gives up and says so
    if fault == "path cut" and side == "there" and operation in (*TRANSFERS, "signal"):
        return {"RailBrokenError", "goes on"}
    return set()


def bound(provider: str, fault: str, operation: str) -> float:
    """Seconds until the survivor has to know."""
    if operation == "barrier" and fault in ("engine closed", "peer closed"):  # signals that it had sent may still be on their way
        return CONFIG["drain_timeout"] + SOON[provider]
    if fault in SILENT:
        return CONFIG["peer_timeout"] + CONFIG["drain_timeout"] + SOON[provider]
    return TIMEOUT + 0.2 if fault in ("cancel", "deadline", "path cut") else SOON[provider]


class Struck:
    """The other side, wherever it runs."""

    async def order(self, **order: Any) -> Any:
        raise NotImplementedError

    async def strike(self, fault: str) -> None:
        raise NotImplementedError

    async def heal(self, fault: str) -> None:
        """End of a stop."""


class Simulated(Struck):
    """Another engine of the fabric."""

    def __init__(self, net: Fabric, party: Party) -> None:
        self.net, self.party = net, party

    async def order(self, **order: Any) -> Any:
        if order["do"] == "begin":
            self.party.begin(order["operation"], order["role"])
        elif order["do"] == "finish":
            await self.party.finish()
            await asyncio.wait([self.party.task], timeout=0.1)
            return self.party.result()
        return None

    async def strike(self, fault: str) -> None:
        engine = self.party.engine
        if fault in ("killed", "restarted"):
            self.net.kill(engine)
        elif fault in ("stopped", "paused"):
            self.net.hold(engine, True)
            if fault == "paused":
                await asyncio.sleep(PAUSE)
                self.net.hold(engine, False)
        elif fault == "bad weather":
            with self.net.faults(delay=(0, 1e-3), refuse=0.5, split=0.5):
                await asyncio.sleep(0.01)
        elif fault == "path cut":
            for a in self.net.engines[:2]:
                for b in self.net.engines[:2]:
                    if a is not b:
                        self.net.cut(a, b)
        else:
            await self.party.strike(fault)

    async def heal(self, fault: str) -> None:
        self.net.hold(self.party.engine, False)


class Process(Struck):
    """Another process of this host, or of another one."""

    def __init__(
        self, address: str, hosts: Hosts | None = None, listen: str | None = None, environ: dict[str, str] | None = None
    ) -> None:
        self.hosts = hosts
        command = [sys.executable, "-m", "tests.reliability.party", address]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        if hosts is None:
            self.process = subprocess.Popen(command, **pipes, env={**os.environ, **(environ or {})})
        else:
            self.process = hosts[1].popen([*command, listen or hosts[1].listen], **pipes)

    async def hear(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(await asyncio.to_thread(self.process.stdout.readline) or "null")

    async def order(self, **order: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        self.process.stdin.flush()
        return await self.hear()

    async def strike(self, fault: str) -> None:
        if fault in ("killed", "restarted"):
            self.process.kill()
            await asyncio.to_thread(self.process.wait)
        elif fault in ("stopped", "paused"):
            os.kill(self.process.pid, signal.SIGSTOP)
            if fault == "paused":
                await asyncio.sleep(PAUSE)
                os.kill(self.process.pid, signal.SIGCONT)
        elif fault == "port down":
            verbs.pull()
        elif fault in SILENT:
            assert self.hosts is not None
            here, there = self.hosts
            {
                "cable cut": there.cut,
                "one-way cut": lambda: there.cut_towards(here),
                "address gone": lambda: there.move("10.99.0.77"),
            }[fault]()
        else:
            await self.order(do="strike", fault=fault, argument=BLOCK)

    async def heal(self, fault: str) -> None:
        if fault == "stopped":
            os.kill(self.process.pid, signal.SIGCONT)
        elif fault == "port down":
            await verbs.plug()
        elif fault == "cable cut" and self.hosts is not None:
            self.hosts[1].mend()
        elif fault == "one-way cut" and self.hosts is not None:
            self.hosts[1].mend_towards(self.hosts[0])

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


async def fire(
    provider: str, fault: str, operation: str, side: str, survivor: Party, struck: Struck, rng: random.Random
) -> Outcome:
    """Let both repeat, strike, and look at the survivor."""
    role = "there" if side == "here" else "here"
    if operation == "read" or role == "there":
        survivor.source.numpy()[:] = 1
    if role == "there":
        survivor.begin(operation, role)
    await struck.order(do="begin", operation=operation, role=side)
    if role == "here":
        survivor.begin(operation, role)
    await asyncio.sleep(rng.uniform(0.001, 0.003) if provider == "loopback" else rng.uniform(0.01, 0.03) * SLOWNESS)
    assert not survivor.task.done(), f"it failed before the fault: {survivor.error!r}"
    begun, may = survivor.clock(), expected(provider, fault, operation, side)
    before = survivor.done
    await struck.strike(fault)
    limit = bound(provider, fault, operation)
    if may:
        await asyncio.wait([survivor.task], timeout=limit + 1)
        if not survivor.task.done() and "goes on" not in may:
            raise AssertionError(f"hang: nothing was seen within {limit + 1:.1f} s")
    else:
        await asyncio.sleep(0.03 if provider == "loopback" else 0.1 * SLOWNESS + BLOCK * (fault == "loop blocked"))
    if survivor.task.done() and survivor.error is not None:
        outcome = Outcome(survivor.result()["errors"], survivor.ended - begun)
        assert set(outcome.errors) <= may, f"{outcome.errors} seen, {may or 'nothing'} expected: {survivor.error}"
        assert outcome.seconds <= limit, f"seen after {outcome.seconds:.3f} s, {limit:.3f} allowed"
        assert survivor.lease is not None
        if fault != "stopped":
            await settled(survivor.lease, 0.1)  # of who died inside a write, the proof may come a little after the news
        outcome.quarantined = survivor.lease.state == "quarantined"  # it was stopped inside a write: that memory is not ours yet
        survivor.region.numpy()[:] = 0x3C
        if fault in SILENT:
            await struck.heal(fault)
        await asyncio.sleep(0.05)
        if "PeerLostError" in outcome.errors:
            await settled(survivor.lease, 1.0)
            assert survivor.lease.state == "revoked", f"the lease is {survivor.lease.state}"
            late = not outcome.quarantined and (survivor.region.numpy() != 0x3C).any()
            assert not late, "late: bytes changed after the peer was given up"
        return outcome
    if fault in SILENT:
        await struck.heal(fault)
    survivor.told = True
    went_on = not expected_to_starve(fault)
    if went_on:
        assert survivor.done > before, "it should have gone on and did nothing"
    result = await struck.order(do="finish")
    await asyncio.wait([survivor.task], timeout=0.3)
    survivor.task.cancel()
    await asyncio.wait([survivor.task], timeout=1)
    if operation in UNITS and role == "there" and result is not None:
        total, units = survivor.counted(), UNITS[operation]
        assert result["done"] * units <= total <= result["begun"] * units, (
            f"{total} counted, {result['done']} to {result['begun']} x {units}"
        )
    return Outcome()


async def settled(lease: at.Lease, seconds: float) -> None:
    """Wait until nothing under it can land any more, at most so long."""
    turns = 0
    while lease.state != "revoked" and turns * 0.005 < seconds:
        turns += 1
        await asyncio.sleep(0.005)


def expected_to_starve(fault: str) -> bool:
    """The struck side does no more of it: the survivor's wait goes on, but has nothing to end it."""
    return fault in ("cancel", "deadline", "regions closed", "lease revoked", "path cut")


async def afterwards(survivor: Party, third: at.Engine, operation: str) -> None:
    """The survivor does the same with somebody else."""
    region = third.allocate(64)
    third.publish("fresh", region)
    try:
        await _afterwards(survivor, third, region, operation)
    finally:
        third.unpublish("fresh")
        region.close()


async def _afterwards(survivor: Party, third: at.Engine, region: at.Region, operation: str) -> None:
    peer = await survivor.engine.connect(third.address)
    remote = await peer.lookup("fresh")
    mine = survivor.engine.allocate(64)
    if operation == "read":
        lease = region.lease(next(p for p in third.peers if p.incarnation == survivor.engine.incarnation), access="read")
        await survivor.engine.read(lease.descriptor, mine)
    elif operation == "message":
        await peer.send(b"hello")
    elif operation == "barrier":
        members = sorted([str(survivor.engine.address), str(third.address)])
        await asyncio.gather(*(engine.group(members, name="after").barrier() for engine in (survivor.engine, third)))
    else:
        await survivor.engine.write(mine, remote, imm=9)
        await third.counter(imm=9).wait(1, timeout=5)
    mine.close()


async def stale(survivor: Party, address: str) -> None:
    """After a restart on the same port: a new peer, and nothing of the old one is worth anything."""
    peer = await survivor.engine.connect(address, timeout=60)  # it may have to start first: how long that takes is not asked here
    assert peer.incarnation != survivor.peer.incarnation
    await peer.ping()
    with pytest.raises(at.StaleRegionError):
        await survivor.engine.write(survivor.source, survivor.remote)


def simulated_cell(fault: str, operation: str, side: str, seed: int) -> Outcome:
    """One cell on the simulator."""

    async def scenario(net: Fabric) -> Outcome:
        rng = random.Random(seed)
        parties = []
        for name in ("survivor", "struck"):
            parties.append(Party(await net.open_engine(config=at.Config(**CONFIG), timeout=TIMEOUT, name=name), lambda: net.now))
        survivor, other = parties
        await asyncio.gather(survivor.meet(None), other.meet(str(survivor.engine.address)))
        assert survivor.lease is not None
        assert other.lease is not None
        survivor.remote = at.RemoteRegion.decode(other.lease.descriptor.encode())
        other.remote = at.RemoteRegion.decode(survivor.lease.descriptor.encode())
        outcome = await fire("loopback", fault, operation, side, survivor, Simulated(net, other), rng)
        if side == "there" and fault in ("regions closed", "lease revoked"):
            assert not (other.region.numpy() == POISON).any()
        if fault == "restarted":
            await net.open_engine(listen=str(other.engine.address), config=at.Config(**CONFIG), name="again")
            await stale(survivor, str(other.engine.address))
        await afterwards(survivor, await net.open_engine(name="third"), operation)
        for party in parties:
            party.task.cancel()
        return outcome

    net = fabric(seed, delay=(1e-6, 1e-4), split=0.1)
    net.loop.set_exception_handler(lambda loop, context: None)
    return net.run(scenario)


async def process_cell(provider: str, fault: str, operation: str, side: str, seed: int, hosts: Hosts | None = None) -> Outcome:
    """One cell between two processes: of one host by shared memory, of two by tcp, of two NICs by verbs."""
    config = at.Config(**CONFIG)
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
    where: dict[str, Any] = verbs.ENGINE if provider == "verbs" else {}
    if hosts is not None:
        where = {"listen": hosts[0].listen, "key": KEY.encode()}
    async with at.open_engine(config=config, timeout=TIMEOUT, name="survivor", **where) as engine:
        async with at.open_engine(name="third", **where) as third:
            return await struck_process(provider, engine, third, fault, operation, side, random.Random(seed), hosts)


async def struck_process(
    provider: str, engine: at.Engine, third: at.Engine, fault: str, operation: str, side: str, rng: random.Random,
    hosts: Hosts | None = None,
) -> Outcome:  # fmt: skip
    """Start another process, strike it, and leave `engine` as it was."""
    survivor = Party(engine)
    struck = Process(str(engine.address), hosts, environ=verbs.ENVIRON if provider == "verbs" else None)
    again: Process | None = None
    try:
        await survivor.meet(None)
        theirs = await struck.hear()
        survivor.remote = at.RemoteRegion.decode(bytes.fromhex(theirs["lease"]))
        assert survivor.lease is not None
        await struck.order(do="remote", lease=survivor.lease.descriptor.encode().hex())
        outcome = await fire(provider, fault, operation, side, survivor, struck, rng)
        if fault == "restarted" and hosts is not None:
            again = Process(str(engine.address), hosts, theirs["address"])
            await stale(survivor, theirs["address"])
        elif fault == "restarted":
            again_here: dict[str, Any] = verbs.ENGINE if provider == "verbs" else {}
            async with at.open_engine(listen=theirs["address"], name="again", **again_here):
                await stale(survivor, theirs["address"])
        await afterwards(survivor, third, operation)
        survivor.task.cancel()
        await asyncio.wait([survivor.task])
    finally:
        struck.close()
        if again is not None:
            again.close()
        await survivor.leave()
    return outcome


def cells(provider: str) -> Iterator[tuple[str, str, str]]:
    """All of them."""
    for fault in FAULTS[provider]:
        for operation in OPERATIONS:
            for side in SIDES:
                yield fault, operation, side


def cell(provider: str, fault: str, operation: str, side: str, seed: int = 0) -> Outcome:
    """Run one. Raises AssertionError with how to repeat it."""
    try:
        if provider == "loopback":
            return simulated_cell(fault, operation, side, seed)
        if provider == "tcp":
            with Hosts(2) as hosts, hosts[0].inside():
                return asyncio.run(process_cell(provider, fault, operation, side, seed, hosts))
        return asyncio.run(process_cell(provider, fault, operation, side, seed))
    except BaseException as error:
        error.add_note(f"python -m tests.reliability.matrix --cell {provider} '{fault}' {operation} {side}")
        raise


def report(results: dict[str, dict[tuple[str, str, str], Outcome]], struck: Counter[str], seconds: float) -> str:
    """A page of the documentation."""
    text = [HEAD.format(cells=sum(map(len, results.values())), seconds=seconds, **CONFIG)]
    for provider, found in results.items():
        text += [f"## {provider}", "", f"| fault | struck | {' | '.join(OPERATIONS)} |", "|---|--:|" + "---|" * len(OPERATIONS)]
        for fault in FAULTS[provider]:
            row = [" / ".join(str(found[fault, operation, side]) for side in SIDES) for operation in OPERATIONS]
            text.append(f"| {fault} | {struck[f'{provider} {fault}']} | {' | '.join(row)} |")
        text.append("")
    return "\n".join(text)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="tests.reliability.matrix")
    parser.add_argument("--cell", nargs=4, metavar=("PROVIDER", "FAULT", "OPERATION", "SIDE"))
    parser.add_argument("--providers", default=",".join(HERE))
    parser.add_argument("--report", action="store_true", help=f"write {REPORT.name} into the documentation")
    arguments = parser.parse_args()
    if arguments.cell:
        print(cell(*arguments.cell))
        return 0
    begun, struck, bad = time.monotonic(), Counter[str](), 0
    results: dict[str, dict[tuple[str, str, str], Outcome]] = {}
    for provider in arguments.providers.split(","):
        results[provider] = {}
        for one in cells(provider):
            try:
                results[provider][one] = cell(provider, *one)
                struck[f"{provider} {one[0]}"] += 1
            except Exception as error:
                bad += 1
                print(f"{provider} {one}: {type(error).__name__}: {error}", flush=True)
    if bad:
        print(f"{bad} cells failed")
        return 1
    text = report(results, struck, time.monotonic() - begun)
    publish(REPORT, text, write=arguments.report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
