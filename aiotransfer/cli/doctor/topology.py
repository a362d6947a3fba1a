"""A machine's topology for people, as a tree, and for programs: what `doctor --topology` prints."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import groupby
from typing import Any, NamedTuple

from aiotransfer.core.nearest import WORDS, Ranked, rank_nics
from aiotransfer.core.pinning import pinning
from aiotransfer.model.topology import Gpu, GpuMemory, HostMemory, Nic, Place, Topology, cpus_text


class Branch(NamedTuple):
    """A line of the tree and those beneath it."""

    text: str
    beneath: list[Branch]


class Pen(NamedTuple):
    """What the lines of the tree are made of."""

    more: str
    last: str
    past: str


LINES, ASCII = Pen("├─", "└─", "│ "), Pen("|-", "`-", "| ")


def draw(topology: Topology, allowed: Collection[int], pen: Pen = LINES) -> str:
    """The tree, then which NICs are nearest to what, then where threads run in a process that may use the
    CPUs `allowed`."""
    lines = []
    for branch in _trees(topology):
        lines.append(branch.text)
        lines.extend(_lines(branch.beneath, "", pen))
    if not topology.nics:
        lines.append("no NIC")
    if not topology.gpus:
        lines.append("no GPU")
    return "\n".join([*lines, *_nearest(topology), *_threads(topology, allowed)])


def record(topology: Topology, allowed: Collection[int]) -> dict[str, Any]:
    """The topology as values for JSON, for programs."""
    threads = {nic.name: pinning(topology, nic.name, allowed) for nic in topology.nics}
    return {
        "nodes": [{"node": n.number, "cpus": sorted(n.cpus), "distances": list(n.distances)} for n in topology.nodes],
        "nics": [_nic(nic) | _where(nic.place) for nic in topology.nics],
        "gpus": [{"number": g.number, "model": g.model, **_where(g.place)} for g in topology.gpus],
        "ranking": {
            title: [{"nic": r.name, "distance": WORDS[r.distance], "steps": r.steps, "reason": r.reason} for r in ranked]
            for title, ranked in _rankings(topology)
        },
        "threads": {name: {"cpus": sorted(found.cpus), "reason": found.reason} for name, found in threads.items()},
    }


def _nic(nic: Nic) -> dict[str, Any]:
    return {"name": nic.name, "rdma": nic.rdma, "interfaces": list(nic.interfaces), "driver": nic.driver, "rate": nic.rate}


def _where(place: Place | None) -> dict[str, Any]:
    if place is None:
        return {"address": None, "root": None, "bridges": [], "node": None}
    return {"address": place.address, "root": place.root, "bridges": list(place.bridges), "node": place.node}


# ---- the tree ----


def _trees(topology: Topology) -> Iterator[Branch]:
    """One for each node, one for what is on none that is known, one for what is on no bus."""
    things: list[Nic | Gpu] = sorted([*topology.nics, *topology.gpus], key=_address)
    known = {node.number for node in topology.nodes}
    for node in topology.nodes:
        here = [thing for thing in things if thing.place is not None and thing.place.node == node.number]
        yield Branch(f"node {node.number}, CPUs {cpus_text(node.cpus)}", _roots(here))
    strays = [thing for thing in things if thing.place is not None and thing.place.node not in known]
    if strays:
        yield Branch("node unknown", _roots(strays))
    loose = [thing for thing in things if thing.place is None]
    if loose:
        yield Branch("on no PCI bus", [Branch(_label(thing), []) for thing in loose])


def _address(thing: Nic | Gpu) -> tuple[int, str]:
    return (len(thing.place.address), thing.place.address) if thing.place is not None else (0, "")


def _roots(things: list[Nic | Gpu]) -> list[Branch]:
    roots = groupby(things, key=lambda thing: thing.place.root if thing.place is not None else "")
    return [Branch(f"root complex {root}", _bridges(list(group), 0)) for root, group in roots]


def _bridges(things: list[Nic | Gpu], depth: int) -> list[Branch]:
    """What is beneath the bridge at this depth; bridges with one thing, or one bridge, behind them are not
    worth a line."""
    branches: list[Branch] = []
    for bridge, group in groupby(things, key=lambda thing: _bridge(thing, depth)):
        several = list(group)
        if bridge is None:
            branches.extend(Branch(_label(thing), []) for thing in several)
            continue
        beneath = _bridges(several, depth + 1)
        branches.extend([Branch(f"bridge {bridge}", beneath)] if len(beneath) > 1 else beneath)
    return branches


def _bridge(thing: Nic | Gpu, depth: int) -> str | None:
    bridges = thing.place.bridges if thing.place is not None else ()
    return bridges[depth] if depth < len(bridges) else None


def _label(thing: Nic | Gpu) -> str:
    if isinstance(thing, Gpu):
        name, facts = f"GPU{thing.number}", [thing.model]
    else:
        over = [interface for interface in thing.interfaces if interface != thing.name]
        name, facts = thing.name, [thing.driver, thing.rate, *over]
    shown = ", ".join(fact for fact in facts if fact)
    return "  ".join(part for part in (name, thing.place.address if thing.place is not None else "", shown) if part)


def _lines(branches: list[Branch], margin: str, pen: Pen) -> Iterator[str]:
    for branch in branches:
        last = branch is branches[-1]
        yield f"{margin}{pen.last if last else pen.more} {branch.text}"
        yield from _lines(branch.beneath, margin + ("   " if last else f"{pen.past} "), pen)


# ---- what follows from it ----


def _rankings(topology: Topology) -> Iterator[tuple[str, tuple[Ranked, ...]]]:
    """Rankings of the RDMA devices; of the interfaces where there are none."""
    names = [nic.name for nic in topology.nics if nic.rdma] or [nic.name for nic in topology.nics]
    for gpu in topology.gpus:
        yield f"GPU{gpu.number}", rank_nics(topology, names, GpuMemory(gpu.place.address))
    for node in topology.nodes:
        yield f"memory of node {node.number}", rank_nics(topology, names, HostMemory(node.number))


def _nearest(topology: Topology) -> Iterator[str]:
    if not topology.nics:
        return
    yield "nearest NICs, best first"
    for title, ranked in _rankings(topology):
        best = [r.name for r in ranked if r.distance == ranked[0].distance]
        yield f"   {title}: {_few(best)} ({WORDS[ranked[0].distance]})"


def _threads(topology: Topology, allowed: Collection[int]) -> Iterator[str]:
    """Once for all NICs of which the same is to be said."""
    found = [pinning(topology, nic.name, allowed) for nic in topology.nics]
    if not found:
        return
    yield "native threads that serve"
    said: dict[str, list[str]] = {}
    for nic, pin in zip(topology.nics, found, strict=True):
        text = f"run on CPUs {cpus_text(pin.cpus)}" if pin.cpus else f"run anywhere: {pin.reason}"
        said.setdefault(text, []).append(nic.name)
    for text, several in said.items():
        yield f"   {_few(several)} {text}"


def _few(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
