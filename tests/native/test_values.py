"""The table of immediates: nothing that was retired is forgotten, and no call moves more than one shelf of it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from aiotransfer.providers import native
from aiotransfer.testing.lanes import LaneNet

HERE = Path(__file__).parent
FFI = HERE.parent.parent / "ffi"
SHELF = 4096


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a compiler")
def test_whatever_is_put_there_and_removed_is_found_or_not(tmp_path: Path) -> None:
    program = tmp_path / "values"
    flags = ["-std=gnu11", "-O1", "-pthread", f"-I{FFI}"]
    built = subprocess.run(["cc", *flags, str(HERE / "values.c"), "-o", str(program)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(native.lib is None, reason="needs the native extension")
def test_a_retired_value_is_never_forgotten_and_no_call_moves_more_than_a_shelf() -> None:
    lib = native.lib
    with LaneNet(2) as net:
        lane, writer = net.lanes[1].lane.pointer, net.lanes[0]
        values = range(0, 120_000 * 7, 7)
        for value in values:
            assert lib.at_imm_close(lane, lib.at_imm_open(lane, value)) == 0
        assert SHELF // 2 < lib.at_imm_moved(lane) <= SHELF
        assert all(lib.at_imm_known(lane, value) for value in values)
        assert not any(lib.at_imm_known(lane, value + 1) for value in values)
        for value in values[::5000]:
            writer.signal(net.lanes[1], value)
        net.run()
        stats = native.ffi.new("at_lane_stats *")
        lib.at_lane_stats_get(lane, stats)
        assert stats.strays == len(values[::5000])


@pytest.mark.skipif(native.lib is None, reason="needs the native extension")
def test_very_many_counters_at_a_time_are_told_apart() -> None:
    lib = native.lib
    with LaneNet(2) as net:
        lane, writer = net.lanes[1].lane.pointer, net.lanes[0]
        records = {value: lib.at_imm_open(lane, value) for value in range(3 * SHELF)}
        assert len(set(records.values())) == len(records)
        chosen = set(list(records)[:: SHELF // 8])
        for value in chosen:
            writer.signal(net.lanes[1], value)
        net.run()
        out = native.ffi.new("uint64_t[2]")
        for value, record in records.items():
            assert lib.at_imm_value(lane, record, out, out + 1) == 0
            assert out[0] == (value in chosen), value
            assert lib.at_imm_close(lane, record) == 0
