"""Which files a checkpoint has, and which of their tensors belong to it."""

from __future__ import annotations

import os
from collections.abc import Iterable

import msgspec

from aiotransfer.quote import quote
from aiotransfer.weights.layouts.errors import PlanError

MOST_INDEX = 256 << 20  # bytes
MOST_FILES = 1 << 14
SUFFIX, INDEX = ".safetensors", ".safetensors.index.json"
WHOLE = "model" + SUFFIX


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def files_of(path: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> dict[str, frozenset[str] | None]:
    """{path of a file: the names that an index says are in it, None: all that it has}.

    `path`: a file, an index, a folder, or files. In a folder that is `model.safetensors`, else what its one
    index names, else every file whose name ends as those of this kind. Raises `FileNotFoundError`,
    `PlanError` for an index that cannot be read.
    """
    if not isinstance(path, str | os.PathLike):
        files = [os.fspath(file) for file in path]
        if not files:
            raise FileNotFoundError("no file was named")
        return dict.fromkeys(files)
    path = os.fspath(path)
    if path.endswith(".json"):
        return _indexed(path)
    if not os.path.isdir(path):
        return {path: None}
    names = sorted(name for name in os.listdir(path) if not name.startswith("."))
    if WHOLE in names:
        return {os.path.join(path, WHOLE): None}
    indices = [name for name in names if name.endswith(INDEX)]
    if len(indices) > 1:
        raise PlanError(f"{path} has several indices: name one of them", problems=indices)
    if indices:
        return _indexed(os.path.join(path, indices[0]))
    found = [os.path.join(path, name) for name in names if name.endswith(SUFFIX)]
    if not found:
        raise FileNotFoundError(f"{path} has no file that ends with {SUFFIX}")
    return dict.fromkeys(found)


def read_index(path: str) -> dict[str, str]:
    """{name of a tensor: name of a file} as an index says. Raises `OSError`, `PlanError`."""
    with open(path, "rb") as file:
        data = file.read(MOST_INDEX + 1)
    try:
        if len(data) > MOST_INDEX:
            raise ValueError(f"it has more than {MOST_INDEX} bytes")
        found = msgspec.json.decode(data, type=_Index).weight_map
        outside = next((name for name in found.values() if name != os.path.basename(name) or name in ("", ".", "..")), None)
        if outside is not None:
            raise ValueError(f"{quote(outside)} is no file beside it")
        if len(set(found.values())) > MOST_FILES:
            raise ValueError(f"it names more than {MOST_FILES} files")
    except (ValueError, msgspec.DecodeError) as error:
        raise PlanError("the checkpoint cannot be used", problems=[f"{path}: {error}"]) from None
    return found


def _indexed(path: str) -> dict[str, frozenset[str] | None]:
    names: dict[str, set[str]] = {}
    for tensor, file in read_index(path).items():
        names.setdefault(os.path.join(os.path.dirname(path), file), set()).add(tensor)
    return {file: frozenset(some) for file, some in sorted(names.items())}
