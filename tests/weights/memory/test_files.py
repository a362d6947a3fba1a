"""Sources that lie in files: any box of them is read as it lies there, and what changes is noticed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import aiotransfer as at
from aiotransfer.weights import Layout, Piece, Tensor
from aiotransfer.weights.memory import stored
from aiotransfer.weights.memory.files import FileBound, FileMemory


@pytest.fixture(scope="module")
def cube(tmp_path_factory: pytest.TempPathFactory) -> tuple[FileMemory, np.ndarray]:
    """Three dimensions behind seven other bytes."""
    path = tmp_path_factory.mktemp("files") / "cube"
    values = np.arange(6 * 40 * 50, dtype=np.uint32).reshape(6, 40, 50)
    path.write_bytes(b"seven b" + values.tobytes() + b"more")
    return FileMemory(str(path)), values


@given(
    box=st.tuples(*(st.tuples(st.integers(0, n - 1), st.integers(1, n)) for n in (6, 40, 50))),
    axes=st.permutations(range(3)),
    slab=st.sampled_from([1, 64, 4096, 1 << 20]),
    direct=st.sampled_from([1, 100, 1 << 20]),
)
def test_a_box_is_read_as_it_lies_in_the_file(
    cube: tuple[FileMemory, np.ndarray], box: tuple[tuple[int, int], ...], axes: list[int], slab: int, direct: int
) -> None:
    file, values = cube
    index = tuple(slice(low, min(low + n, size)) for (low, n), size in zip(box, values.shape, strict=True))
    wanted = values[index].transpose(axes)
    offset = 7 + sum(low * stride for (low, _), stride in zip(box, values.strides, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "SLAB", slab)
        patch.setattr(stored, "DIRECT", direct)
        there = np.zeros(wanted.shape, np.uint32)
        file.bring(there, offset, wanted.strides)
        np.testing.assert_array_equal(there, wanted)
        wide = np.zeros((*wanted.shape, 2), np.uint32)[..., 0]  # with gaps
        file.bring(wide, offset, wanted.strides)
        np.testing.assert_array_equal(wide, wanted)


def test_a_file_that_was_cut_short_says_where_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    file = FileMemory(str(path))
    os.truncate(path, 60)
    with pytest.raises(at.BrokenError, match=r"file ends at byte 60: it had 100 bytes"):
        file.bring(np.zeros(100, np.uint8), 0, (1,))


def test_a_file_that_changes_is_noticed_and_one_that_is_replaced_is_read_on(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(8))
    layout = Layout([Tensor("w", (8,), "uint8")], [Piece("w", 0, buffer="f")], ranks=1)
    bound = FileBound(layout, 0, {"f": FileMemory(str(path))})
    assert not bound.changed(bound.opened())
    (tmp_path / "new").write_bytes(b"another!")
    os.replace(tmp_path / "new", path)
    assert not bound.changed(bound.opened())
    there = np.ones(8, np.uint8)
    bound.memory["f"].bring(there, 0, (1,))
    assert not there.any()
    other = FileBound(layout, 0, {"f": FileMemory(str(path))})
    os.truncate(path, 4)
    assert other.changed(other.opened()) == ["f"]


def test_what_is_no_regular_file_is_refused_and_keeps_nothing_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(ValueError, match="no regular file"):
            FileMemory(str(tmp_path / name))
    with pytest.raises(FileNotFoundError):
        FileMemory(str(tmp_path / "none"))
