"""What a checkpoint has, and everything that can be wrong with one, before anything of it is read."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aiotransfer.errors import ConfigurationError
from aiotransfer.weights import PlanError
from aiotransfer.weights.checkpoint import header, open_checkpoint
from tests.weights.checkpoint.samples import raw, write, write_index

F32 = np.arange(12, dtype=np.float32).reshape(3, 4)


def tensor(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def problems(path: Any) -> tuple[str, ...]:
    with pytest.raises(PlanError) as caught:
        open_checkpoint(path)
    return caught.value.problems


def test_a_file_says_its_tensors_types_texts_and_tied_names(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    whole = {
        "w": ("float32", F32), "b": ("bfloat16", np.arange(5, dtype=np.uint16)), "s": ("int64", np.array(7)),
        "q": ("float8_e4m3fn", np.zeros((2, 3), np.uint8)), "none": ("float16", np.zeros((0, 4), np.float16)),
        "mlp.experts.0.up": ("uint8", np.ones(1, np.uint8)),
    }  # fmt: skip
    write(path, whole, {"format": "pt", "head": "w", "note": "x"})
    found = open_checkpoint(path)
    layout = found.layout
    said = dict(zip(layout.names, zip(layout.shapes, layout.dtypes, layout.groups, strict=True), strict=True))
    assert said == {
        "w": ((3, 4), "float32", "dense"), "b": ((5,), "bfloat16", "dense"), "q": ((2, 3), "float8_e4m3fn", "dense"),
        "s": ((), "int64", "dense"), "none": ((0, 4), "float16", "dense"), "mlp.experts.0.up": ((1,), "uint8", "experts"),
    }  # fmt: skip
    assert layout.aliases == {"head": layout.names.index("w")}
    assert (found.version, found.metadata["note"]) == (None, "x")
    there = np.zeros((3, 4), np.uint32)
    piece = int(np.flatnonzero(layout.piece_tensor == layout.names.index("w"))[0])
    found.memory[str(path)].bring(there, int(layout.piece_offset[piece]), layout.piece_strides[piece])
    np.testing.assert_array_equal(there.view(np.float32), F32)
    assert not layout.problems()


def test_a_folder_is_its_whole_file_or_what_its_index_names_or_all_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.safetensors", {name: ("float32", F32), f"{name}2": ("float32", F32)})
    assert sorted(open_checkpoint(tmp_path).layout.names) == ["a", "a2", "b", "b2"]
    assert open_checkpoint(tmp_path / "b.safetensors").layout.names == ("b", "b2")
    assert open_checkpoint([tmp_path / "b.safetensors", tmp_path / "a.safetensors"]).layout.names == ("b", "b2", "a", "a2")
    write_index(tmp_path, {"a": "a.safetensors", "b2": "b.safetensors"})
    assert open_checkpoint(tmp_path).layout.names == ("a", "b2")  # the index says what belongs to it
    assert open_checkpoint(tmp_path / "model.safetensors.index.json").layout.names == ("a", "b2")
    write(tmp_path / "model.safetensors", {"c": ("float32", F32)})
    assert open_checkpoint(tmp_path).layout.names == ("c",)
    (tmp_path / "empty").mkdir()
    for where in (tmp_path / "empty", []):
        with pytest.raises(FileNotFoundError):
            open_checkpoint(where)
    write_index(tmp_path / "empty", {}, "x.safetensors.index.json")
    write_index(tmp_path / "empty", {}, "y.safetensors.index.json")
    assert problems(tmp_path / "empty") == ("x.safetensors.index.json", "y.safetensors.index.json")


def test_every_rank_of_several_holds_everything(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", {"w": ("float32", F32)})
    how: Any = {"ranks": 3, "hosts": ["x", "x", "y"], "mesh_group": lambda name: "g"}
    found = open_checkpoint(tmp_path, rank=2, **how)
    assert (found.rank, found.layout.ranks, found.layout.hosts, found.layout.groups) == (2, 3, ("x", "x", "y"), ("g",))
    assert found.layout.piece_rank.tolist() == [0, 1, 2]
    assert found.layout.digest == open_checkpoint(tmp_path, **how).layout.digest
    for rank, error in ((3, ValueError), (-1, ValueError), ("1", TypeError)):
        with pytest.raises(error):
            open_checkpoint(tmp_path, ranks=3, rank=rank)  # type: ignore[arg-type]


HOSTILE = {
    "empty": (b"", "less than the length of a header"),
    "seven bytes": (b"\0" * 7, "less than the length of a header"),
    "a length of 2**63": (b"\0" * 7 + b"\x80", "its header would have 9223372036854775808 bytes"),
    "a length behind the end": ((100).to_bytes(8, "little") + b"{}", "its header would have 100 bytes: the file has 10"),
    "a header above the bound": ((100_000_001).to_bytes(8, "little") + b"{}", "a header at most 100000000"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_without_a_header_that_can_be_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(HOSTILE[name][0])
    (problem,) = problems(tmp_path / "x.safetensors")
    assert problem.startswith(str(tmp_path / "x.safetensors") + ": ")
    assert HOSTILE[name][1] in problem


WRONG: dict[str, tuple[Any, bytes]] = {
    "no JSON": (b"{{{{{{{{", b""),
    "no UTF-8": (b"\xff\xfe{}    ", b""),
    "a list": ([1, 2], b""),
    "offsets that overlap": ({"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}, bytes(12)),
    "a hole": ({"a": tensor([2], 0, 8), "b": tensor([2], 12, 20)}, bytes(20)),
    "offsets that fall": ({"a": tensor([0], 8, 0)}, bytes(8)),
    "cut short": ({"a": tensor([1 << 40], 0, 1 << 42)}, bytes(64)),
    "bytes behind the tensors": ({"a": tensor([2], 0, 8)}, bytes(9)),
    "a shape that is not the bytes": ({"a": tensor([3], 0, 8)}, bytes(8)),
    "a shape that is no number": ({"a": tensor([1 << 63, 1 << 63], 0, 8)}, bytes(8)),
    "a negative extent": ({"a": tensor([-2], 0, 8)}, bytes(8)),
    "an unknown type": ({"a": tensor([2], 0, 8, "X99")}, bytes(8)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_header_that_lies_is_refused_whatever_it_says(tmp_path: Path, name: str) -> None:
    path = raw(tmp_path / "x.safetensors", *WRONG[name])
    (problem,) = problems(path)
    assert problem.startswith(f"{path}: ")
    assert len(problem) > len(str(path)) + 10


def test_a_type_that_this_library_cannot_move_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(header.DTYPES, "F32")
    write(tmp_path / "x.safetensors", {"w": ("float32", F32)})
    assert problems(tmp_path / "x.safetensors")[0].endswith("w is of the type F32, which cannot be moved")


def test_all_that_is_wrong_with_all_files_is_in_one_report(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", {"a": ("float32", F32)})
    write(tmp_path / "c.safetensors", {"c": ("float32", F32)})
    os.truncate(tmp_path / "c.safetensors", os.path.getsize(tmp_path / "c.safetensors") - 1)
    write_index(tmp_path, {"a": "a.safetensors", "gone": "a.safetensors", "b": "b.safetensors", "c": "c.safetensors"})
    missing, lost, cut = problems(tmp_path)
    assert missing.endswith("a.safetensors: it has no tensor gone, which the index says is there")
    assert lost.endswith("b.safetensors: No such file or directory")
    assert "c.safetensors: " in cut


def test_a_name_in_two_files_and_files_of_two_saves(tmp_path: Path) -> None:
    ours = {"aiotransfer.version": "1.2", "aiotransfer.save": "x"}
    write(tmp_path / "a.safetensors", {"a": ("float32", F32)}, ours)
    write(tmp_path / "b.safetensors", {"a": ("float32", F32)}, ours | {"aiotransfer.version": "1.3", "aiotransfer.save": "y"})
    twice, mixed = problems(tmp_path)
    assert twice.endswith("b.safetensors: a stands in another file, too")
    assert "were not saved together" in mixed
    assert "(1.2)" in mixed
    assert "(1.3)" in mixed
    assert open_checkpoint(tmp_path / "a.safetensors").version == (1, 2)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"{", "truncated"), (b"[]", "Expected `object`"), (b"{}", "weight_map"),
        (b'{"weight_map": {"a": 1}}', "Expected `str`"), (b'{"weight_map": {"a": "../a.safetensors"}}', "no file beside it"),
        (b'{"weight_map": {"a": "/etc/passwd"}}', "no file beside it"), (b'{"weight_map": {"a": ".."}}', "no file beside it"),
        (b'{"weight_map": {"a": ""}}', "no file beside it"),
    ],
)  # fmt: skip
def test_an_index_that_cannot_be_read_or_leaves_its_folder(tmp_path: Path, text: bytes, why: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(text)
    (problem,) = problems(tmp_path)
    assert why in problem


def test_without_the_library_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ConfigurationError, match="safetensors") as caught:
        open_checkpoint(tmp_path)
    assert "pip install" in str(caught.value.hint)
