"""Leases in files, by clocks that are set, differ or stand apart."""

from __future__ import annotations

import pytest

import aiotransfer as at
from aiotransfer.kv.registry.stamp import Clocks, Stamp, is_good, pack, sight, unpack

HERE = Clocks(1000.0, 50.0, "here")


def later(seconds: float, *, step: float = 0.0, boot: str = "here", up: float = 0.0) -> Clocks:
    return Clocks(HERE.wall + seconds + step, HERE.up + seconds + up, boot)


@pytest.mark.parametrize("step", [0.0, 1e6, -1e6])
def test_on_one_host_the_wall_clock_may_be_set_at_will(step: float) -> None:
    stamp = Stamp.until(10, HERE)
    for seconds, good in ((9.9, True), (10.0, False)):
        now = later(seconds, step=step)
        assert is_good(sight(None, stamp, now), now) is good


def test_on_another_host_the_wall_clock_decides_at_first_sight() -> None:
    stamp = Stamp.until(10, HERE)
    for seconds, good in ((9.9, True), (10.1, False)):
        now = later(seconds, boot="there", up=7777)
        assert is_good(sight(None, stamp, now), now) is good


@pytest.mark.parametrize("step", [0.0, 1e6, -1e6])
def test_on_another_host_a_lease_that_is_renewed_is_good_whatever_its_wall_clock_says(step: float) -> None:
    seen = None
    for seconds in (0.0, 3.0, 6.0):
        seen = sight(seen, Stamp.until(10, later(seconds)), later(seconds, step=step, boot="there"))
    for seconds, good in ((15.9, True), (16.0, False)):
        assert seen is not None
        assert is_good(seen, later(seconds, step=step, boot="there")) is good


def test_on_another_host_nobody_believes_longer_than_one_lease_in_what_does_not_change() -> None:
    stamp = Stamp.until(10, later(0, step=1e6))
    seen = sight(None, stamp, later(0, boot="there"))
    assert is_good(sight(seen, stamp, later(9)), later(9, boot="there"))
    assert not is_good(sight(seen, stamp, later(10)), later(10, boot="there"))


def test_hosts_without_a_name_for_their_boot_are_not_taken_for_one() -> None:
    stamp = Stamp.until(10, later(0, boot=""))
    now = later(11, boot="", up=-1000)
    assert not is_good(sight(None, stamp, now), now)


def test_a_file_holds_a_stamp_and_a_value() -> None:
    stamp = Stamp.until(10, HERE)
    assert unpack(pack(stamp, b"a\nb")) == (stamp, b"a\nb")
    for data in (b"", b"junk\nx", b"[1]", pack(stamp, b"").replace(b'"v":1', b'"v":9'), pack(Stamp.until(-1, HERE), b"")):
        with pytest.raises(at.DescriptorError):
            unpack(data)
