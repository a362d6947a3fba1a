"""The node of memory of this process."""

from __future__ import annotations

import mmap

import numpy as np
import pytest

from aiotransfer.providers.host import numa
from aiotransfer.providers.host.sysfs import read_topology


def test_touched_memory_is_on_a_node_that_exists() -> None:
    memory = np.ones(1 << 20, np.uint8)
    node = numa.node_of(memory.ctypes.data)
    assert node is None or read_topology().node(node) is not None or not read_topology().nodes


def test_where_nothing_is_mapped_there_is_no_node() -> None:
    assert numa.node_of(0) is None
    assert numa.node_of(mmap.PAGESIZE) is None


def test_other_processors_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numa.platform, "machine", lambda: "riscv64")
    assert numa.node_of(np.ones(8).ctypes.data) is None
