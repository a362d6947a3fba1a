"""The ranking of paths: every provider is either a path or has a reason, and the order is the asker's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiotransfer.core.ranking import AUTOMATIC, SAME_HOST, apart, rank
from aiotransfer.model.offer import ProviderOffer

names = st.sampled_from(AUTOMATIC)
offers = st.lists(
    st.builds(ProviderOffer, names, st.booleans(), st.just("why not"), st.sampled_from([b"", b"a", b"b"]), st.just(b"")),
    max_size=6,
    unique_by=lambda offer: offer.provider,
)
preferences = st.one_of(st.just("auto"), names, st.lists(names, min_size=1, max_size=5, unique=True))
requirements = st.one_of(st.none(), names)


@given(offers, offers, preferences, requirements)
def test_each_provider_is_a_path_or_has_exactly_one_reason(
    mine: list[ProviderOffer], theirs: list[ProviderOffer], preference: str | list[str], require: str | None
) -> None:
    ranking = rank(mine, theirs, preference, require)
    refused = [name for name, _ in ranking.reasons]
    order = AUTOMATIC if preference == "auto" else [preference] if isinstance(preference, str) else preference
    my, their = ({o.provider: o for o in side} for side in (mine, theirs))
    assert not set(refused) & set(ranking.paths)
    assert len(set(refused)) == len(refused)
    assert list(ranking.paths) == [name for name in order if name in ranking.paths], "my order"
    for name in order:
        if name in my or name in their:
            assert (name in ranking.paths) != (name in refused)
    for name in ranking.paths:
        assert my[name].usable
        assert their[name].usable
        assert require in (None, name)
        assert name not in SAME_HOST or my[name].host == their[name].host
    assert require is None or require in ranking.paths or require in refused, "what was required is explained"
    assert all(reason for _, reason in ranking.reasons)


@given(offers, offers)
def test_both_sides_see_the_same_paths(mine: list[ProviderOffer], theirs: list[ProviderOffer]) -> None:
    assert rank(mine, theirs).paths == rank(theirs, mine).paths


@pytest.mark.parametrize(("mine", "theirs", "who"), [(b"", b"a", "this side"), (b"a", b"", "the other side")])
def test_a_side_that_does_not_know_its_host_is_not_said_to_be_on_another_one(mine: bytes, theirs: bytes, who: str) -> None:
    tcp = ProviderOffer("tcp", True, "", b"", b"")
    here, there = ([ProviderOffer("shm", True, "", host, b""), tcp] for host in (mine, theirs))
    ranking = rank(here, there)
    assert ranking.paths == ("tcp",)
    assert dict(ranking.reasons)["shm"].startswith(f"{who} cannot tell which host")
    assert not apart("shm", mine, theirs)
    assert apart("shm", b"a", b"b")
    assert not apart("tcp", b"a", b"b")
