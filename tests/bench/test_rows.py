"""Rows of the benchmark's table, made of known rounds."""

from __future__ import annotations

from aiotransfer.bench.rows import Row, size_name


def test_a_row_has_the_median_of_its_rounds_and_of_their_ratios() -> None:
    row = Row("write 4 KiB", "GB/s")
    for ours, limit in ((2.0, 4.0), (9.0, 10.0), (3.0, 4.0)):
        row.add(ours, limit)
    assert row.summary() == {
        "case": "write 4 KiB", "unit": "GB/s", "note": "", "ours": 3.0, "ours_min": 2.0, "ours_max": 9.0,
        "limit": 4.0, "ratio": 0.75, "ratio_min": 0.5, "ratio_max": 0.9,
    }  # fmt: skip


def test_a_row_without_a_limit_has_no_ratio() -> None:
    row = Row("idle", "ms")
    row.add(1.0, None)
    assert set(row.summary()) == {"case", "unit", "note", "ours", "ours_min", "ours_max"}


def test_sizes_are_named_in_the_greatest_unit_that_fits() -> None:
    assert [size_name(n) for n in (1 << 10, 64 << 10, 1 << 20, 256 << 20)] == ["1 KiB", "64 KiB", "1 MiB", "256 MiB"]
