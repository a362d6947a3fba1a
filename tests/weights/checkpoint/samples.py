"""Small checkpoints, which the library can read, and files that it cannot."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

safetensors = pytest.importorskip("safetensors")
TYPES = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "uint8": "U8", "float8_e4m3fn": "F8_E4M3",
}  # fmt: skip


def write(path: Path, tensors: Mapping[str, tuple[str, Any]], metadata: dict[str, str] | None = None) -> None:
    """{name: (type, array)}; types that NumPy lacks as unsigned integers. The library has no stable way to write those."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, (dtype, array) in tensors.items():
        begin = len(data)
        data += np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": TYPES[dtype], "shape": list(array.shape), "data_offsets": [begin, len(data)]}
    raw(path, header, data)
    with safetensors.safe_open(str(path), framework="numpy") as found:
        assert set(found.keys()) == set(tensors)


def write_index(folder: Path, where: Mapping[str, str], name: str = "model.safetensors.index.json") -> None:
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": dict(where)}))


def raw(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    """A file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """{name: array} and the texts of a file, as the library has them."""
    from safetensors.numpy import load_file

    with safetensors.safe_open(str(path), framework="numpy") as found:
        metadata = dict(found.metadata() or {})
    return load_file(str(path)), metadata
