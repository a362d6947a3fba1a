"""Foreign access: what one file reads and writes of the private names of classes and modules that another file defines.

Whose name it is follows from the annotations of parameters, attributes and results, where these say it. Where they do not, the
name itself decides: it is foreign if no class of the file has a private name like it and a class of another file has. So access
is missed where the type is not known and both classes have the name. Files, not classes, are the unit: what stands in one file
is read together.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.architecture.sources import Finding, Function, Module, home

MUTATE = {
    "add",
    "append",
    "appendleft",
    "clear",
    "discard",
    "extend",
    "insert",
    "pop",
    "popitem",
    "popleft",
    "remove",
    "setdefault",
    "update",
}
OF_TUPLES = {"_replace", "_asdict", "_fields", "_make", "_field_defaults"}


class Access(NamedTuple):
    """One access: `owner` is the module that defines the name, or "" where several could."""

    module: Module
    line: int
    text: str
    owner: str
    writes: bool


@dataclass
class Class:
    """A class of the package: its private names, and which classes its attributes and results are."""

    module: str
    name: str
    bases: list[str]
    private: set[str] = field(default_factory=set)
    types: dict[str, ast.expr] = field(default_factory=dict)  # by attribute, property or method: its annotation
    resolved: dict[str, str] = field(default_factory=dict)  # by attribute: a class, where an assignment says it


def is_private(name: str) -> bool:
    """One leading underscore or two, but not a name of Python's own."""
    return name.startswith("_") and not name.endswith("__") and name != "_"


class Package:
    """All classes, and what each module calls which of them."""

    def __init__(self, modules: Mapping[str, Module]) -> None:
        self.modules = modules
        self.classes: dict[str, Class] = {}
        self.names: dict[str, dict[str, str]] = {}  # by module: what a name there is, "module:Class" or a module
        self.owners: dict[str, set[str]] = {}  # by private name: modules whose classes or functions define it
        for module in modules.values():
            self._collect(module)
        for module in modules.values():
            self.names[module.name] = self._names(module)
        for one in self.classes.values():
            self._fill(one)
        for one in self.classes.values():
            for name in one.private:
                self.owners.setdefault(name, set()).add(one.module)

    def _collect(self, module: Module) -> None:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                bases = [ast.unparse(base).partition("[")[0] for base in node.bases]
                self.classes.setdefault(f"{module.name}:{node.name}", Class(module.name, node.name, bases))

    def _names(self, module: Module) -> dict[str, str]:
        known: dict[str, str] = {}
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    full, called = f"{node.module}.{alias.name}", alias.asname or alias.name
                    if full in self.modules:
                        known[called] = full
                    elif f"{home(self.modules, node.module, alias.name)}:{alias.name}" in self.classes:
                        known[called] = f"{home(self.modules, node.module, alias.name)}:{alias.name}"
            elif isinstance(node, ast.ClassDef):
                known[node.name] = f"{module.name}:{node.name}"
        return known

    def _fill(self, one: Class) -> None:
        tree = self.modules[one.module].tree
        body = next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == one.name).body
        for node in body:
            if isinstance(node, Function):
                if node.returns is not None:
                    one.types[node.name] = node.returns
                one.private |= {node.name} if is_private(node.name) else set()
                self._fill_from(one, node)
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
            for target in targets:
                if isinstance(target, ast.Name):
                    one.private |= {target.id} if is_private(target.id) else set()
                    if isinstance(node, ast.AnnAssign):
                        one.types[target.id] = node.annotation
                    if target.id == "__slots__" and isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                        slots = [leaf.value for leaf in ast.walk(node.value) if isinstance(leaf, ast.Constant)]
                        one.private |= {slot for slot in slots if isinstance(slot, str) and is_private(slot)}

    def _fill_from(self, one: Class, method: Function) -> None:
        """Attributes that a method sets on its own object."""
        scope = Scope(self, one.module, one, method)
        for node in ast.walk(method):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
            for target in [leaf for one_target in targets for leaf in ast.walk(one_target)]:
                if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == scope.itself:
                    one.private |= {target.attr} if is_private(target.attr) else set()
                    if isinstance(node, ast.AnnAssign):
                        one.types.setdefault(target.attr, node.annotation)
                    elif isinstance(node, ast.Assign) and target in node.targets and (kind := scope.kind(node.value)):
                        one.resolved.setdefault(target.attr, kind)

    def annotated(self, module: str, annotation: ast.expr | None) -> str:
        """The class that an annotation names, "" where it names none or several."""
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            annotation = ast.parse(annotation.value, mode="eval").body
        if isinstance(annotation, ast.BinOp):
            sides = {self.annotated(module, side) for side in (annotation.left, annotation.right)} - {""}
            return sides.pop() if len(sides) == 1 else ""
        if isinstance(annotation, ast.Name):
            found = self.names.get(module, {}).get(annotation.id, "")
            return found if ":" in found else ""
        return ""

    def line(self, kind: str) -> Iterator[Class]:
        """A class and those that it inherits from."""
        one = self.classes.get(kind)
        if one is not None:
            yield one
            for base in one.bases:
                yield from self.line(self.names.get(one.module, {}).get(base, ""))

    def attribute(self, kind: str, name: str) -> str:
        """The class of an attribute, of a property or of what a method returns."""
        for one in self.line(kind):
            if name in one.types:
                return self.annotated(one.module, one.types[name])
            if name in one.resolved:
                return one.resolved[name]
        return ""

    def homes(self, kind: str, name: str) -> set[str]:
        """Modules of the class and its line, above and below, that define a private name."""
        above = {one.module for one in self.line(kind) if name in one.private}
        if above:
            return above
        named = ((key, one) for key, one in self.classes.items() if name in one.private)
        return {one.module for key, one in named if self.classes.get(kind) in list(self.line(key))}


class Scope:
    """What the names inside one function are."""

    def __init__(self, package: Package, module: str, inside: Class | None, function: Function) -> None:
        self.package, self.module, self.inside = package, module, inside
        given = [*function.args.posonlyargs, *function.args.args]
        self.itself = given[0].arg if inside is not None and given else ""
        self.kinds: dict[str, str] = {}
        for arg in [*given, *function.args.kwonlyargs]:
            self.kinds[arg.arg] = package.annotated(module, arg.annotation)
        if inside is not None and self.itself:
            self.kinds[self.itself] = f"{inside.module}:{inside.name}"
        for node in ast.walk(function):
            self._learn(node)

    def _learn(self, node: ast.AST) -> None:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            self.kinds[node.target.id] = self.package.annotated(self.module, node.annotation)
        elif isinstance(node, ast.NamedExpr):
            self.kinds.setdefault(node.target.id, self.kind(node.value))
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    self.kinds.setdefault(target.id, self.kind(node.value))
                elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    for one, value in zip(target.elts, node.value.elts, strict=False):
                        if isinstance(one, ast.Name):
                            self.kinds.setdefault(one.id, self.kind(value))

    def kind(self, node: ast.expr) -> str:
        """The class of an expression, "" where it is not known."""
        if isinstance(node, ast.Await):
            return self.kind(node.value)
        if isinstance(node, ast.Name):
            return self.kinds.get(node.id, "")
        if isinstance(node, ast.Attribute):
            kind = self.kind(node.value)
            return self.package.attribute(kind, node.attr) if kind else ""
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                found = self.package.names.get(self.module, {}).get(node.func.id, "")
                return found if ":" in found else ""
            return self.kind(node.func)
        return ""


def accesses(modules: Mapping[str, Module]) -> list[Access]:
    """Every access to a private name that another file defines."""
    package = Package(modules)
    found: list[Access] = []
    for module in modules.values():
        for inside, function, nodes in _functions(module, package):
            scope = Scope(package, module.name, inside, function) if function is not None else None
            for node, writes in _private(nodes):
                owners = _owners(package, module, scope, node)
                if owners and module.name not in owners:
                    found.append(Access(module, node.lineno, ast.unparse(node), owners.pop() if len(owners) == 1 else "", writes))
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ImportFrom) and node.module in modules:
                for alias in node.names:
                    if is_private(alias.name) and f"{node.module}.{alias.name}" not in modules and node.module != module.name:
                        found.append(Access(module, node.lineno, f"import of {alias.name}", str(node.module), False))
    return found


def _functions(module: Module, package: Package) -> Iterator[tuple[Class | None, Function | None, list[ast.AST]]]:
    """Each outermost function with its class and all nodes within; last, what stands outside of functions."""
    outside: list[ast.AST] = []

    def visit(node: ast.AST, inside: Class | None) -> Iterator[tuple[Class | None, Function, list[ast.AST]]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                yield inside, child, list(ast.walk(child))
            elif isinstance(child, ast.ClassDef):
                yield from visit(child, package.classes[f"{module.name}:{child.name}"])
            else:
                outside.append(child)
                yield from visit(child, inside)

    yield from visit(module.tree, None)
    yield None, None, outside


def _private(nodes: list[ast.AST]) -> Iterator[tuple[ast.Attribute, bool]]:
    """Attributes with private names, and whether they are changed: assigned, deleted, or what they hold is."""
    changed: set[int] = set()
    for node in nodes:
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            changed.add(id(node.value))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATE:
            changed.add(id(node.func.value))
    for node in nodes:
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in OF_TUPLES:
            yield node, isinstance(node.ctx, ast.Store | ast.Del) or id(node) in changed


def _owners(package: Package, module: Module, scope: Scope | None, node: ast.Attribute) -> set[str]:
    """Modules that define the name; empty: it is no name of this package, or the object's own."""
    value = node.value
    if isinstance(value, ast.Name):
        if scope is not None and value.id == scope.itself:
            return set()
        named = package.names[module.name].get(value.id, "")
        if named in package.modules:
            return {named}
        if ":" in named:
            return package.homes(named, node.attr)
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "super":
        return set()
    kind = scope.kind(value) if scope is not None else ""
    if kind:
        return package.homes(kind, node.attr)
    owners = set(package.owners.get(node.attr, ()))
    return set() if module.name in owners else owners


def foreign(modules: Mapping[str, Module]) -> dict[str, list[Finding]]:
    """The four rules: reads and writes of another file, and of those the ones of a file in another folder."""
    found: dict[str, list[Finding]] = {
        "foreign reads": [],
        "foreign writes": [],
        "reads across folders": [],
        "writes across folders": [],
    }
    for access in accesses(modules):
        what = "writes" if access.writes else "reads"
        owner = modules[access.owner].path if access.owner else "one of several files"
        finding = Finding(access.module.room, f"{access.module.path}:{access.line}", f"{what} {access.text} of {owner}")
        found[f"foreign {what}"].append(finding)
        if not access.owner or modules[access.owner].room != access.module.room:
            found[f"{what} across folders"].append(finding)
    return found


def across_rooms(modules: Mapping[str, Module]) -> dict[str, tuple[dict[str, set[str]], list[Finding]]]:
    """By folder, its rooms included, of private names of another room or folder: those that it reads, by the file that defines
    them ("" where that is not known), and each place that changes one."""
    found: dict[str, tuple[dict[str, set[str]], list[Finding]]] = {}
    for access in accesses(modules):
        room = access.module.room
        owner = modules[access.owner] if access.owner else None
        if owner is not None and owner.room == room:
            continue
        reads, writes = found.setdefault(room.partition("/")[0], ({}, []))
        path = "" if owner is None else owner.path
        if access.writes:
            writes.append(Finding(room, f"{access.module.path}:{access.line}", f"writes {access.text} of {path or 'several'}"))
        else:
            reads.setdefault(path, set()).add(re.split(r"[. ]", access.text)[-1])
    return found
