"""Arrows that a page names between functions, held against the sources.

A step of a page is a list item of one of two forms:

    - `FILE` `FUNCTION` calls `FILE` `FUNCTION`: what happens.
    - `FILE` `FUNCTION` leads by `NAME` to `FILE` `FUNCTION`: what happens.

`calls`: the first names the second, which its folder may import or include, so the way goes down. `leads by`: the first uses
NAME, and the second uses it, too (the kind of an event, a message), or a table or an attribute of that name is filled with it (a
function of a port, a callback). Only such an arrow may go up. A function of Python is named with its classes, one of C by itself.
The sources are read as text, so nothing is imported or built. A function that is not where the page says is looked for elsewhere.

    python -m tests.docs.arrows     writes into the page where functions are now that were moved; what was renamed stays as it is
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from tests.architecture import native
from tests.architecture.native import MAY_INCLUDE
from tests.architecture.sources import functions
from tests.test_architecture import LEAVES, MAY_IMPORT, ROOMS

ROOT = Path(__file__).parent.parent.parent
STEP = re.compile(r"- `([^`]+)` `([^`]+)` (?:calls|leads by `([^`]+)` to) `([^`]+)` `([^`]+)`: \S.*")
CALLS_C = ("aiotransfer/providers/", "aiotransfer/engine/")  # the second by the written exception for the short way


class Place(NamedTuple):
    """A function, and the file that defines it."""

    path: str
    name: str

    def __str__(self) -> str:
        return f"{self.path} {self.name}"


class Step(NamedTuple):
    """One arrow of a page. `by`: the name that leads there, empty where it is a plain call."""

    source: Place
    by: str
    target: Place


class Body(NamedTuple):
    """What a function names, and the members of structures that it uses (in C)."""

    names: frozenset[str]
    members: frozenset[str]


def steps(section: str) -> tuple[list[Step], list[str]]:
    """The steps of a section, and the list items that begin as one and are none."""
    items = re.split(r"\n(?=\S)", re.sub(r"\n  +", " ", section))
    found, wrong = [], []
    for item in (item.strip() for item in items if item.startswith("- `")):
        step = STEP.fullmatch(item)
        if step is None:
            wrong.append(item)
        else:
            found.append(Step(Place(step[1], step[2]), step[3] or "", Place(step[4], step[5])))
    return found, wrong


def tree() -> dict[str, str]:
    """The sources of the package and of its C code, by path."""
    python = {str(file.relative_to(ROOT)): file.read_text() for file in sorted((ROOT / "aiotransfer").rglob("*.py"))}
    return python | native.tree()


@functools.lru_cache(maxsize=1000)
def bodies(path: str, text: str) -> Mapping[str, Body]:
    """Every function of a file by its name; of Python also every class, which stands for its constructor."""
    return dict(_of_python(text) if path.endswith(".py") else _of_c(path, text))


def _of_python(text: str) -> Iterator[tuple[str, Body]]:
    module = ast.parse(text)
    tables: dict[str, set[str]] = {}  # by a name of the module: what it stands for
    for node in module.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                tables.update({name: _names(node.value) for name in _names(target)})
    every: list[tuple[str, ast.AST]] = [*functions(module)]
    every += [(node.name, node) for node in module.body if isinstance(node, ast.ClassDef)]
    for name, node in every:
        names = _names(node)
        yield name, Body(frozenset(names.union(*(tables.get(one, set()) for one in names))), frozenset())


def _names(node: ast.AST) -> set[str]:
    inner = list(ast.walk(node))
    return {one.id for one in inner if isinstance(one, ast.Name)} | {one.attr for one in inner if isinstance(one, ast.Attribute)}


def _of_c(path: str, text: str) -> Iterator[tuple[str, Body]]:
    file = native.read(path, text)
    lines = native.COMMENT.sub(lambda found: "\n" * found[0].count("\n"), text).splitlines()
    for name, named in file.functions.items():
        names = set(named).union(*(file.macros.get(one, set()) for one in named))
        first, n = file.lines[name]
        inside = "\n".join(lines[first - 1 : first - 1 + n])
        yield name, Body(frozenset(names), frozenset(re.findall(r"(?:->|\.)\s*(\w+)", inside)))


def faults(section: str, sources: Mapping[str, str]) -> list[str]:
    """What of a section's steps is not so in these sources. Empty: all of it is."""
    every, wrong = steps(section)
    found = [f"not a step: {item}" for item in wrong]
    seen = {every[0].source} if every else set()
    for step in every:
        if step.source not in seen:
            found.append(f"no step before leads to {step.source}")
        seen |= {step.source, step.target}
        found += broken(step, sources)
    return list(dict.fromkeys(found))


def broken(step: Step, sources: Mapping[str, str]) -> list[str]:
    """What is not so of one arrow."""
    gone = [place for place in (step.source, step.target) if place.name not in bodies(place.path, sources.get(place.path, ""))]
    if gone:
        return [f"{place} is not there{_elsewhere(place, sources)}" for place in gone]
    return _led(step, sources) if step.by else _called(step, sources)


def elsewhere(place: Place, sources: Mapping[str, str]) -> list[Place]:
    """Where functions of that name are in other files, those with the same classes first."""
    suffix, last = Path(place.path).suffix, place.name.rpartition(".")[2]
    found = [
        Place(path, name)
        for path, text in sources.items()
        if Path(path).suffix == suffix and path != place.path and re.search(rf"\b{last}\b", text)
        for name in bodies(path, text)
        if name.rpartition(".")[2] == last
    ]
    return sorted(found, key=lambda one: one.name != place.name)


def _elsewhere(place: Place, sources: Mapping[str, str]) -> str:
    there = elsewhere(place, sources)
    return f"; {there[0].path} has {there[0].name}" if there else ""


def _called(step: Step, sources: Mapping[str, str]) -> list[str]:
    body = bodies(step.source.path, sources[step.source.path])[step.source.name]
    found = []
    if step.target.name.rpartition(".")[2] not in body.names:
        found.append(f"{step.source} does not name {step.target.name}")
    if not goes_down(step.source.path, step.target.path):
        found.append(f"{step.source} lies beneath {step.target}: a call cannot go there")
    return found


def _led(step: Step, sources: Mapping[str, str]) -> list[str]:
    source, target = (bodies(place.path, sources[place.path])[place.name] for place in (step.source, step.target))
    if not _uses(source, step.by):
        return [f"{step.source} does not use {step.by}"]
    last = step.target.name.rpartition(".")[2]
    if _uses(target, step.by) or _is_filled(step.by, last, step.target.path, sources):
        return []
    return [f"{step.target} does not use {step.by}, and nothing of that name is filled with it"]


def _uses(body: Body, name: str) -> bool:
    return name in body.names or name in body.members


def _is_filled(by: str, name: str, path: str, sources: Mapping[str, str]) -> bool:
    """Whether a table or an attribute `by` gets a function of that name: of Python anywhere, of C where it can be seen."""
    if path.endswith(".py"):
        filled = re.compile(rf"(\.{by} = |\b{by}=)[^\n]*\b{name}\b")
        return any(filled.search(text) for other, text in sources.items() if other.endswith(".py"))
    filled = re.compile(rf"\.{by}\s*=\s*{name}\b")
    return any(filled.search(text) for other, text in sources.items() if other.endswith((".c", ".h")))


def goes_down(source: str, target: str) -> bool:
    """Whether a file may call another one: of its own folder, or of one that lies beneath that."""
    if source.endswith(".py") and not target.endswith(".py"):
        return source.startswith(CALLS_C)
    if not source.endswith(".py") and target.endswith(".py"):
        return False
    beneath = MAY_IMPORT if source.endswith(".py") else MAY_INCLUDE
    rooms = [_room(path, beneath) for path in (source, target)]
    if rooms[0] == rooms[1] and rooms[0] in ROOMS and source.endswith(".py"):
        return _goes_down_within(rooms[0], source, target)
    return rooms[0] == rooms[1] or rooms[1] in beneath.get(rooms[0], set()) | LEAVES


def _goes_down_within(folder: str, source: str, target: str) -> bool:
    """Whether a file may call another of the same folder: of its room, or of one beneath that. The folder is above its rooms."""
    here, there = ("/".join(path.removeprefix(f"aiotransfer/{folder}/").split("/")[:-1]) for path in (source, target))
    return here in ("", there) or there in ROOMS[folder].get(here, set())


def _room(path: str, known: Mapping[str, set[str]]) -> str:
    """The folder that the rules name, or the module itself where it lies in none."""
    inner = path.partition("/")[2]
    rooms = [room for room in known if inner.startswith(f"{room}/")]
    return max(rooms, key=len) if rooms else inner.rpartition(".")[0]


def moved(text: str, sources: Mapping[str, str]) -> str:
    """A page with the files in which its functions are now, where there is one of that name alone."""
    for path, name in sorted(set(re.findall(r"`([\w/.]+\.(?:py|c|h))` `([\w.]+)`", text))):
        if name not in bodies(path, sources.get(path, "")):
            there = [place for place in elsewhere(Place(path, name), sources) if place.name == name]
            near = [place for place in there if place.path.split("/")[:2] == path.split("/")[:2]]
            if len(there := near or there) == 1:
                text = text.replace(f"`{path}` `{name}`", f"`{there[0].path}` `{name}`")
    return text


if __name__ == "__main__":
    page = ROOT / "docs" / "development" / "six-ways.md"
    page.write_text(moved(page.read_text(), tree()))
