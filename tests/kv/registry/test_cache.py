"""What is known of the members, entry by entry."""

from __future__ import annotations

from aiotransfer.kv.registry.cache import Cache
from aiotransfer.kv.registry.changes import Change, differences
from aiotransfer.kv.registry.member import Member
from tests.kv.registry.members import member

A, B = member("a"), member("b")


def of(*members: Member) -> dict[str, bytes]:
    return {one.key: one.encode() for one in members}


def test_members_are_those_of_the_last_answer() -> None:
    cache = Cache(5)
    assert cache.seen is None
    assert cache.take(of(A, B), 1.0) == []
    assert list(cache.members.values()) == [A, B]
    cache.take(of(B), 2.0)
    assert (list(cache.members.values()), cache.seen) == ([B], 2.0)


def test_after_an_outage_those_who_are_missing_have_some_time_to_come_back() -> None:
    cache = Cache(5)
    cache.take(of(A, B), 1.0)
    cache.failed()
    assert list(cache.members.values()) == [A, B]
    cache.take(of(B), 100.0)
    cache.take({}, 104.9)
    assert list(cache.members.values()) == [A, B]
    cache.take(of(B), 105.0)
    assert list(cache.members.values()) == [B]


def test_unreadable_bytes_are_told_of_once_and_change_nothing() -> None:
    cache = Cache(5)
    cache.take(of(A), 1.0)
    for _ in range(2):
        told = cache.take({A.key: b"junk", B.key: b"{", "decode-1": A.encode()}, 2.0)
        assert list(cache.members.values()) == [A]
        assert len(told) == (3 if _ == 0 else 0)
    assert "decode-1" in cache.take({A.key: b"junk", "decode-1": A.encode() + b" "}, 3.0)[0]
    cache.take(of(B), 4.0)
    assert list(cache.members.values()) == [B]


def test_differences_name_newcomers_first() -> None:
    later = member("a", incarnation=A.incarnation, address=A.address, labels={})
    assert differences({A.key: A, B.key: B}, {A.key: later, "c": B}) == [
        Change("joined", B), Change("changed", later), Change("left", B)
    ]  # fmt: skip
