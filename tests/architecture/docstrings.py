"""Docstrings: what a user may give is named there, and a docstring says more than a name does."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping

from tests.architecture.sizes import methods
from tests.architecture.sources import Finding, Function, Module, exported, functions, parameters

LEAST_WORDS = 5  # of a docstring


def is_public(module: Module, name: str, public: Mapping[str, set[str]]) -> bool:
    """Whether a function, or the class that it is a method of, is one that a package exports."""
    first, _, rest = name.partition(".")
    return first in public.get(module.name, ()) and (not rest.startswith("_") or rest == "__init__") and "." not in rest


def named(parameter: str, docstring: str) -> bool:
    """Whether a docstring names a parameter: by itself or within other code between backticks, as in `width=`."""
    code = re.findall(r"`+([^`]+)`+", docstring)
    return any(re.search(rf"(?<![\w.]){re.escape(parameter)}(?!\w)", one) for one in code)


def is_for_users(class_: ast.ClassDef) -> bool:
    """Whether users call the constructor: not of errors, nor of what a call of another object makes ("Made by `...`")."""
    made = "Made by" in (ast.get_docstring(class_) or "")
    return not made and not any(ast.unparse(base).endswith(("Error", "Exception")) for base in class_.bases)


def _public(modules: Mapping[str, Module]) -> Iterator[tuple[Module, str, Function, str, list[str]]]:
    """Every function that users call, with its docstring (of a constructor: that of the class) and its parameters. Without those
    that say where their contract stands: "See `Backend`."."""
    public = exported(modules)
    for module in modules.values():
        inner = methods(module)
        classes = {node.name: node for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef)}
        for name, function in functions(module.tree):
            if is_public(module, name, public):
                docstring = ast.get_docstring(function) or ""
                if name.endswith(".__init__"):
                    class_ = classes[name.partition(".")[0]]
                    if not is_for_users(class_):
                        continue
                    docstring += ast.get_docstring(class_) or ""
                if docstring.startswith("See `"):
                    continue
                yield module, name, function, docstring, parameters(function, method=function in inner)


def unnamed_parameters(modules: Mapping[str, Module]) -> list[Finding]:
    """Parameters of what users call that the docstring does not name."""
    return [
        Finding(module.room, f"{module.path}:{function.lineno}", f"{name} does not name {parameter}")
        for module, name, function, docstring, given in _public(modules)
        for parameter in given
        if not named(parameter, docstring)
    ]


def short_docstrings(modules: Mapping[str, Module]) -> list[Finding]:
    """Docstrings of fewer than `LEAST_WORDS` words, but for those that say where the contract stands: "See `Room`."."""
    found = []
    for module in modules.values():
        nodes = [(name, node) for name, node in functions(module.tree)]
        every: list[tuple[str, Function | ast.ClassDef]] = [*nodes]
        every += [(node.name, node) for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef)]
        for name, node in every:
            docstring = ast.get_docstring(node)
            if docstring is not None and len(docstring.split()) < LEAST_WORDS and not docstring.startswith("See `"):
                found.append(Finding(module.room, f"{module.path}:{node.lineno}", f"{name}: {docstring!r}"))
    return found
