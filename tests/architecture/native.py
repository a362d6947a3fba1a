"""The call graph of `ffi/`, read from the text of the C files.

Our C is plain enough for it: a function definition begins at the outermost level, every global function has a name of its own,
static ones are those of their file, and a macro stands for the names in its text. What is called through a pointer is no arrow:
the table of functions is how a room is called without being known. Both sides of every `#if` count.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from tests.architecture.circles import components
from tests.architecture.sizes import MOST_FUNCTION, room_of
from tests.architecture.sources import ROOT, Finding

TOKEN = re.compile(r"[A-Za-z_]\w*|->|[{}();=,.]|\n|[^\s\w]|\d\w*")
COMMENT = re.compile(r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'', re.DOTALL)
WORDS = {"if", "for", "while", "switch", "return", "sizeof", "do", "else", "case", "defined"}
MAY_INCLUDE = {  # folder: those beneath it, whose headers it may include
    "lane": set(),
    "rows": set(),
    "sim": {"lane"},
    "fabric": {"lane"},
    "shm": {"lane", "rows"},
    "ofi": {"lane", "fabric"},
    "simrail": {"lane", "fabric"},
    "verbs": {"lane", "fabric"},
    "bench": {"rows"},
}


@dataclass
class File:
    """One C file: its functions, what each of them names, and its macros."""

    path: str
    functions: dict[str, set[str]] = field(default_factory=dict)
    static: set[str] = field(default_factory=set)
    lines: dict[str, tuple[int, int]] = field(default_factory=dict)  # by function: the first one, and how many
    macros: dict[str, set[str]] = field(default_factory=dict)


def read(path: str, text: str) -> File:
    """What one file defines and names."""
    file = File(path)
    text = COMMENT.sub(lambda found: "\n" * found[0].count("\n") or " ", text)
    lines: list[str] = []
    joined = text.replace("\\\n", "\\ ")
    for line in joined.split("\n"):
        macro = re.match(r"\s*#\s*define\s+(\w+)(.*)", line)
        if macro:
            file.macros[macro[1]] = set(re.findall(r"(?<![\w.])[A-Za-z_]\w*", macro[2]))
        directive = line.lstrip().startswith("#")
        lines.append("" if directive else line)
        lines += [""] * line.count("\\ ") if directive else []
    _functions(file, "\n".join(lines))
    return file


def _functions(file: File, text: str) -> None:
    line, depth = 1, 0
    head: list[str] = []  # tokens since the last end of something at the outermost level
    name, begun, body, before = "", 0, set[str](), ""
    for token in TOKEN.findall(text):
        if token == "\n":
            line += 1
            continue
        if depth == 0:
            if token == "{":
                depth, name, begun, body = 1, _defined(head), line, set()
            elif token == ";":
                head = []
            else:
                head.append(token)
        else:
            depth += {"{": 1, "}": -1}.get(token, 0)
            if depth == 0:
                if name:
                    file.functions[name] = body
                    file.lines[name] = begun, line - begun + 1
                    if "static" in head:
                        file.static.add(name)
                    head = []
                else:
                    head.append("{}")
            elif re.match(r"[A-Za-z_]", token) and before not in (".", "->") and token not in WORDS:
                body.add(token)
        before = token


def _defined(head: list[str]) -> str:
    """The function whose head these tokens are, "" where it is a type or a table."""
    if "=" in head or not head or head[-1] != ")":
        return ""
    depth = 0
    for i in range(len(head) - 1, -1, -1):
        depth += {")": 1, "(": -1}.get(head[i], 0)
        if depth == 0 and head[i] == "(":
            if i and head[i - 1] == "__attribute__":
                return _defined(head[: i - 1])
            return head[i - 1] if i and re.match(r"[A-Za-z_]\w*$", head[i - 1]) else ""
    return ""


def tree() -> dict[str, str]:
    """All C files of `ffi/`, by path."""
    return {str(file.relative_to(ROOT)): file.read_text() for file in sorted((ROOT / "ffi").rglob("*.[ch]"))}


def calls(sources: Mapping[str, str]) -> dict[tuple[str, str], set[str]]:
    """Which file names functions of which other one, and which functions."""
    files = [read(path, text) for path, text in sources.items()]
    where = {name: file.path for file in files for name in file.functions if name not in file.static}
    macros = {name: body for file in files for name, body in file.macros.items()}
    found: dict[tuple[str, str], set[str]] = {}
    for file in files:
        for body in file.functions.values():
            names, new = set(body), set(body)
            while new := set().union(*(macros[name] for name in new if name in macros)) - names:
                names |= new
            for name in names - file.static:
                if where.get(name, file.path) != file.path:
                    found.setdefault((file.path, where[name]), set()).add(name)
    return found


def files_on_circles(sources: Mapping[str, str]) -> list[Finding]:
    """Each C file that is reached again by the calls that it makes."""
    found = []
    for circle in components(calls(sources)):
        text = f"on a circle of {len(circle)} files in {', '.join(sorted({room_of(path) for path in circle}))}"
        found += [Finding(room_of(path), path, text) for path in sorted(circle)]
    return found


def calls_on_circles(sources: Mapping[str, str]) -> list[Finding]:
    """Each pair of C files of one circle of which the first calls the second."""
    every = calls(sources)
    circle_of = {path: number for number, one in enumerate(components(every)) for path in one}
    return [
        Finding(room_of(source), source, f"calls {target}: {', '.join(sorted(names))}")
        for (source, target), names in every.items()
        if source in circle_of and circle_of[source] == circle_of.get(target)
    ]


def folders_on_circles(sources: Mapping[str, str]) -> list[Finding]:
    """Each folder of `ffi/` that is reached again by the calls that it makes."""
    between = {(room_of(source), room_of(target)) for source, target in calls(sources)}
    return [Finding(room, room, f"on a circle of {len(one)} folders") for one in components(between) for room in sorted(one)]


def folders(sources: Mapping[str, str]) -> set[str]:
    """The folders of `ffi/` that have C files."""
    return {PurePosixPath(path).parts[1] for path in sources if path.count("/") > 1}


def upward_includes(sources: Mapping[str, str]) -> list[Finding]:
    """Headers that a folder includes and that are of no folder beneath it; `native.h`, which names them all, is for the build."""
    found = []
    for path, text in sources.items():
        folder = PurePosixPath(path).parts[1]
        for number, line in enumerate(text.splitlines(), 1):
            header = re.match(r'\s*#\s*include "([^"]+)"', line)
            if header and folder in MAY_INCLUDE:
                there = header[1].partition("/")[0] if "/" in header[1] else folder
                if there not in MAY_INCLUDE[folder] | {folder} or header[1] == "native.h":
                    found.append(Finding(f"ffi/{folder}", f"{path}:{number}", f"includes {header[1]}"))
    return found


def long_functions(sources: Mapping[str, str]) -> list[Finding]:
    """C functions of more than `MOST_FUNCTION` lines, from the opening brace on."""
    found = []
    for file in (read(path, text) for path, text in sources.items()):
        for name, (line, n) in file.lines.items():
            if n > MOST_FUNCTION:
                found.append(Finding(room_of(file.path), f"{file.path}:{line}", f"{name} has {n} lines"))
    return found
