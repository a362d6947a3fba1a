"""Circles: modules that cannot be read, tested or moved without each other, whatever kind of import makes them so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tests.architecture.sources import Arrow, Finding, Module, arrows


def components(edges: Iterable[tuple[str, str]]) -> list[set[str]]:
    """Sets of more than one node from each of which every other one of the set can be reached (Tarjan, without recursion)."""
    graph: dict[str, list[str]] = {}
    for source, target in edges:
        graph.setdefault(source, []).append(target)
        graph.setdefault(target, [])
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    path: list[str] = []
    on_path: set[str] = set()
    found: list[set[str]] = []
    for root in graph:
        if root in number:
            continue
        work = [(root, iter(graph[root]))]
        number[root] = low[root] = len(number)
        path.append(root)
        on_path.add(root)
        while work:
            node, rest = work[-1]
            for child in rest:
                if child not in number:
                    number[child] = low[child] = len(number)
                    path.append(child)
                    on_path.add(child)
                    work.append((child, iter(graph[child])))
                    break
                if child in on_path:
                    low[node] = min(low[node], number[child])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == number[node]:
                    one = set(path[path.index(node) :])
                    del path[path.index(node) :]
                    on_path -= one
                    if len(one) > 1:
                        found.append(one)
    return found


def arrows_on_circles(modules: Mapping[str, Module]) -> list[Finding]:
    """Each import between two modules of which each reaches the other by imports, those for annotations and those inside
    functions included."""
    every = arrows(modules)
    circle_of = {name: number for number, one in enumerate(components((a.source, a.target) for a in every)) for name in one}
    once: dict[tuple[str, str], Arrow] = {}
    for arrow in every:
        if arrow.source in circle_of and circle_of[arrow.source] == circle_of.get(arrow.target):
            once.setdefault((arrow.source, arrow.target), arrow)
    return [
        Finding(modules[a.source].room, f"{modules[a.source].path}:{a.line}", f"imports {a.target} ({a.kind})")
        for a in once.values()
    ]


def upward_arrows(modules: Mapping[str, Module], may_import: Mapping[str, set[str]], leaves: set[str]) -> list[Finding]:
    """Each import of a room that is not beneath the importing one, and, of two rooms within one that import each other, those of
    the side that does it less often. Unlike the hard rule, this one counts imports for annotations, too."""
    found = []
    between: dict[tuple[str, str], list[Finding]] = {}
    for arrow in arrows(modules):
        here, there = modules[arrow.source], modules[arrow.target]
        finding = Finding(here.room, f"{here.path}:{arrow.line}", f"imports {arrow.target} ({arrow.kind})")
        top, beneath = here.room.partition("/")[0], arrow.target.split(".")[1] if "." in arrow.target else ""
        if top in may_import and top != "cli" and beneath not in may_import[top] | leaves | {top}:
            found.append(finding)
        elif here.room != there.room and top == there.room.partition("/")[0]:
            between.setdefault((here.room, there.room), []).append(finding)
    for (here_room, there_room), ones in between.items():
        back = between.get((there_room, here_room), [])
        if back and (len(ones), here_room) < (len(back), there_room):
            found += ones
    return found


def out_of_rooms(modules: Mapping[str, Module], folder: str, rooms: Mapping[str, set[str]]) -> list[Finding]:
    """Each import within `folder` that leaves a room for one that is not beneath it, whatever kind of import it is.
    `rooms`: those beneath each. The folder's own files are the room "", which is above all where it is not named."""
    allowed = {f"{folder}/{room}".rstrip("/"): {f"{folder}/{one}".rstrip("/") for one in (room, *rooms[room])} for room in rooms}
    found = []
    for arrow in arrows(modules):
        here, there = modules[arrow.source], modules[arrow.target].room
        if here.room in allowed and there.partition("/")[0] == folder and there not in allowed[here.room]:
            found.append(Finding(here.room, f"{here.path}:{arrow.line}", f"imports {arrow.target}"))
    return found
