"""Sizes: long functions, long files, and functions with so many parameters that a call of them cannot be read."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from tests.architecture.sources import PACKAGE, ROOT, Finding, Function, Module, functions, parameters

MOST_FUNCTION = 60  # lines, from `def` to the last
MOST_PARAMETERS = 7
MOST_FILE = 500  # lines
FOLDERS = (PACKAGE, "ffi", "examples", "tests", "docs/snippets")


def files() -> Iterator[tuple[str, str]]:
    """Path and text of every source file of ours, Python and C."""
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in (".py", ".c", ".h") and "__pycache__" not in file.parts:
                yield str(file.relative_to(ROOT)), file.read_text()


def room_of(path: str) -> str:
    """The folder of a path: of the package without its name, of all else as it is."""
    return str(Path(path).parent).removeprefix(f"{PACKAGE}/")


def long_files(sources: Mapping[str, str]) -> list[Finding]:
    """Files that are longer than one job usually is."""
    lengths = {path: len(text.splitlines()) for path, text in sources.items()}
    return [Finding(room_of(path), path, f"{n} lines") for path, n in lengths.items() if n > MOST_FILE]


def long_functions(sources: Mapping[str, str]) -> list[Finding]:
    """Python functions of more lines than fit on a screen; those of C are counted beside their call graph."""
    found = []
    for path, text in sources.items():
        if path.endswith(".py"):
            for name, function in functions(ast.parse(text)):
                n = (function.end_lineno or 0) - function.lineno + 1
                if n > MOST_FUNCTION:
                    found.append(Finding(room_of(path), f"{path}:{function.lineno}", f"{name} has {n} lines"))
    return found


def methods(module: Module) -> set[Function]:
    """The functions that stand directly in a class."""
    bodies = (node.body for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef))
    return {node for body in bodies for node in body if isinstance(node, Function)}


def many_parameters(modules: Mapping[str, Module]) -> list[Finding]:
    """Functions of more than `MOST_PARAMETERS`. A data class has no `__init__` of its own in the source, so that it does not
    count."""
    found = []
    for module in modules.values():
        inner = methods(module)
        for name, function in functions(module.tree):
            n = len(parameters(function, method=function in inner))
            if n > MOST_PARAMETERS:
                found.append(Finding(module.room, f"{module.path}:{function.lineno}", f"{name} has {n} parameters"))
    return found


def listed(findings: Iterable[Finding]) -> set[str]:
    """Findings about functions as the lists of exceptions name them: the path and the function, without the line."""
    return {f"{one.where.partition(':')[0]} {one.what.partition(' ')[0]}" for one in findings}
