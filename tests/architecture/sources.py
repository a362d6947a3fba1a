"""The sources as syntax trees: which modules there are, what each imports, and which names other packages may use."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent
PACKAGE = "aiotransfer"
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Finding(NamedTuple):
    """One thing that a rule counts: in which folder, at which place, and what it is."""

    room: str
    where: str
    what: str


class Arrow(NamedTuple):
    """One import. `kind`: "top" (when the module is read), "lazy" (inside a function) or "typing" (for annotations only)."""

    source: str
    target: str
    kind: str
    line: int


class Module(NamedTuple):
    """One file of the package."""

    name: str
    path: str
    tree: ast.Module

    @property
    def room(self) -> str:
        """The folder that it lies in, without the package's name: "engine", "kv/registry"; "." for the package's own."""
        parts = self.path.split("/")[1:-1]
        return "/".join(parts) or "."


def module_name(path: str) -> str:
    """`aiotransfer/kv/__init__.py` is `aiotransfer.kv`."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def package(sources: Mapping[str, str] | None = None) -> dict[str, Module]:
    """The modules of the package by name: of `sources` (path: text), or those of this tree."""
    if sources is None:
        sources = {str(file.relative_to(ROOT)): file.read_text() for file in sorted((ROOT / PACKAGE).rglob("*.py"))}
    return {module_name(path): Module(module_name(path), path, ast.parse(text)) for path, text in sources.items()}


def imports(module: Module, modules: Iterable[str]) -> Iterator[Arrow]:
    """Every import of a module in `modules`, wherever it stands. Importing a package's module does not count as its package."""
    known = set(modules)

    def targets(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.name.split(".")
            above = ".".join(base[: len(base) - node.level + module.path.endswith("__init__.py")]) if node.level else ""
            start = ".".join(filter(None, (above, node.module)))
            for alias in node.names:
                yield f"{start}.{alias.name}" if f"{start}.{alias.name}" in known else start
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (str(given.value) for given in node.args[:1] if isinstance(given, ast.Constant))

    def visit(node: ast.AST, kind: str) -> Iterator[Arrow]:
        for target in targets(node):
            if target in known and target != module.name:
                yield Arrow(module.name, target, kind, getattr(node, "lineno", 0))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from visit(child, "typing")
            for child in node.orelse:
                yield from visit(child, kind)
            return
        if isinstance(node, Function | ast.Lambda):
            kind = "lazy" if kind == "top" else kind
        for child in ast.iter_child_nodes(node):
            yield from visit(child, kind)

    yield from visit(module.tree, "top")


def arrows(modules: Mapping[str, Module]) -> list[Arrow]:
    """Every import between these modules."""
    return [arrow for module in modules.values() for arrow in imports(module, modules)]


def functions(tree: ast.AST, inside: str = "") -> Iterator[tuple[str, Function]]:
    """Every function with the names of the classes and functions around it: `Peer.send`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function | ast.ClassDef):
            name = f"{inside}.{node.name}" if inside else node.name
            if not isinstance(node, ast.ClassDef):
                yield name, node
            yield from functions(node, name)
        else:
            yield from functions(node, inside)


def parameters(function: Function, *, method: bool) -> list[str]:
    """The names of all parameters, without `self` or `cls`."""
    given = function.args
    names = [arg.arg for arg in (*given.posonlyargs, *given.args)]
    if method and not any(ast.unparse(one) == "staticmethod" for one in function.decorator_list):
        names = names[1:]
    names += [arg.arg for arg in given.kwonlyargs]
    return names + [arg.arg for arg in (given.vararg, given.kwarg) if arg is not None]


def exported(modules: Mapping[str, Module]) -> dict[str, set[str]]:
    """By module: the classes and functions of it that a package's `__all__` names, wherever they are imported from."""
    found: dict[str, set[str]] = {}
    for module in modules.values():
        named: set[str] = set()
        for node in module.tree.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__" and isinstance(node.value, ast.List):
                named |= {str(ast.literal_eval(one)) for one in node.value.elts}
        if not named or not module.path.endswith("__init__.py"):
            continue
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ImportFrom) and node.module in modules:
                for alias in node.names:
                    if (alias.asname or alias.name) in named:
                        found.setdefault(home(modules, str(node.module), alias.name), set()).add(alias.name)
    return found


def home(modules: Mapping[str, Module], module: str, name: str) -> str:
    """The module that defines what `module` calls `name`: its own, or where it imports it from."""
    seen: set[str] = set()
    while module in modules and module not in seen:
        seen.add(module)
        tree = modules[module].tree
        if any(isinstance(node, Function | ast.ClassDef) and node.name == name for node in tree.body):
            return module
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in node.names):
                module = str(node.module)
                break
    return module
