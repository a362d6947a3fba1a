"""A checkpoint as the weights of a publisher."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence

from aiotransfer.quote import quote
from aiotransfer.weights.checkpoint.finding import files_of
from aiotransfer.weights.checkpoint.header import Header, Unreadable, header_of, library
from aiotransfer.weights.layouts.derive import usual_group
from aiotransfer.weights.layouts.errors import PlanError
from aiotransfer.weights.layouts.layout import Layout, Piece, Tensor
from aiotransfer.weights.memory.files import FileBound, FileMemory
from aiotransfer.weights.protocol.version import Version

VERSION, SAVE = "aiotransfer.version", "aiotransfer.save"  # texts in the header of a file that `save` wrote


class Checkpoint(FileBound):
    """The tensors of safetensors files, as rank `rank` of `layout.ranks` publisher ranks reads them. Made by
    `open_checkpoint`.

    `layout`: every rank holds all of them, so the ranks share the reading; `version`: of the weights that
    `save` has written here, else None; `metadata`: the texts of the files' headers.
    """

    version: Version | None
    metadata: dict[str, str]


def open_checkpoint(
    path: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    ranks: int = 1,
    rank: int = 0,
    mesh_group: Callable[[str], str] | None = None,
    hosts: Sequence[str] | None = None,
) -> Checkpoint:
    """What `Publisher(engine, checkpoint)` publishes: the tensors of safetensors files. Headers alone are
    read here.

    `path`: a file, an index (`model.safetensors.index.json`), several files, or a folder: of it
    `model.safetensors`, else what its one index names, else every file that ends with `.safetensors`.

    `ranks`, `rank`: of the publishers' group, all of which can read the files (default: 1 and 0, a publisher
    alone). `mesh_group`, `hosts`: as for `layout_of`. A name that a header's texts say is another one's (as
    `safetensors.torch.save_model` writes tied tensors) becomes an alias. Where there is an index, tensors
    that it does not name are no part of the checkpoint.

    The files must rest until they are published; one that changes is found by its size and time, and ends the
    version. They are closed when nothing holds the checkpoint any more.

    Raises `PlanError` that lists what is wrong with all files (missing, cut short, not of this kind, of a
    type that cannot be moved, an index that names what is not there, a name in two files, files of different
    saves), `OSError`, `ConfigurationError` (the library safetensors is not installed), `TypeError`,
    `ValueError`.
    """
    library()
    read = _Contents(mesh_group or usual_group, ranks)
    for name, wanted in files_of(path).items():
        read.add(name, wanted)
    problems = [*read.problems, *_mixed(read.headers)]
    if problems:
        raise PlanError("the checkpoint cannot be used", problems=problems)
    sizes = {(r, name): file.nbytes for name, file in read.files.items() for r in range(ranks)}
    layout = Layout(read.tensors.values(), read.pieces, ranks=ranks, hosts=hosts, buffers=sizes)
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank must be an int, not {quote(rank)}")
    if not 0 <= rank < ranks:
        raise ValueError(f"there is no rank {rank} of {ranks}")
    found = Checkpoint(layout, rank, read.files)
    found.metadata = {key: text for header in read.headers.values() for key, text in header.metadata.items()}
    number = re.fullmatch(r"(\d{1,10})\.(\d{1,19})", found.metadata.get(VERSION, ""), re.ASCII)
    found.version = None if number is None else Version(int(number[1]), int(number[2]))
    return found


class _Contents:
    """What the headers of files say, one file after the other, and all that is wrong with them."""

    def __init__(self, group_of: Callable[[str], str], ranks: int) -> None:
        self._group_of, self._ranks = group_of, ranks
        self.problems: list[str] = []
        self.files: dict[str, FileMemory] = {}
        self.headers: dict[str, Header] = {}
        self.tensors: dict[str, Tensor] = {}
        self.pieces: list[Piece] = []

    def add(self, name: str, wanted: frozenset[str] | None) -> None:
        """Read the header of one file, of which the tensors `wanted` (None: all) are part of the
        checkpoint."""
        try:
            file = self.files[name] = FileMemory(name)
            header = self.headers[name] = header_of(file)
        except (Unreadable, ValueError) as error:
            self.problems.append(f"{name}: {error}")
            return
        except OSError as error:
            self.problems.append(f"{name}: {error.strerror}")
            return
        self.problems += [f"{name}: it has no tensor {tensor}, which the index says is there"
                          for tensor in sorted((wanted or frozenset()) - header.tensors.keys())]  # fmt: skip
        aliases: dict[str, list[str]] = {}
        for alias, of in header.metadata.items():
            if of in header.tensors and alias not in header.tensors and alias != "format":
                aliases.setdefault(of, []).append(alias)
        for tensor, entry in header.tensors.items():
            if wanted is not None and tensor not in wanted:
                continue
            if tensor in self.tensors:
                self.problems.append(f"{name}: {tensor} stands in another file, too")
            tied = tuple(aliases.get(tensor, ()))
            self.tensors[tensor] = Tensor(tensor, entry.shape, entry.dtype, self._group_of(tensor), tied)
            self.pieces += [Piece(tensor, r, buffer=name, offset=entry.offset) for r in range(self._ranks)]


def _mixed(headers: dict[str, Header]) -> list[str]:
    """Files that `save` did not write together."""
    saves: dict[tuple[str | None, str | None], str] = {}
    for name, header in headers.items():
        saves.setdefault((header.metadata.get(SAVE), header.metadata.get(VERSION)), name)
    if len(saves) < 2:
        return []
    said = ", ".join(f"{name} ({version or 'no version'})" for (_, version), name in saves.items())
    return [f"these files were not saved together: {said}"]
