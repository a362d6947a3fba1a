"""What ranks conclude from a shared store, without one."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

import aiotransfer as at
from aiotransfer.rendezvous.roster import Entry, Launch, addresses, check_place, digest, named

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


def world(*hosts: str, place: str = "here") -> list[Entry]:
    return [Entry(rank, len(hosts), f"{host}:{7000 + rank}", rank + 1, place) for rank, host in enumerate(hosts)]


def judged(entries: list[Entry], rank: int = 0, own: Entry | None = None) -> list[str]:
    return addresses(own or entries[rank], [entry.encode() for entry in entries])


def test_the_addresses_come_in_order_of_rank() -> None:
    assert judged(world("10.0.0.1", "10.0.0.2"), rank=1) == ["10.0.0.1:7000", "10.0.0.2:7001"]


@given(st.binary(max_size=200))
def test_any_bytes_are_an_entry_or_the_one_error(data: bytes) -> None:
    with contextlib.suppress(at.RendezvousError):
        assert Entry.decode(data, 0).rank == 0


@pytest.mark.parametrize(
    "data", [b'[1,0,1,"a:1",5,3]', b'[1,1,1,"a:1",5,"p"]', b'[2,0,1,"a:1",5,"p"]', b'[1,0,1,"a",5,"p"]', b"{}", b"[]"]
)
def test_an_entry_of_another_version_rank_or_shape_is_refused(data: bytes) -> None:
    with pytest.raises(at.RendezvousError, match="rank 0"):
        Entry.decode(data, 0)


def test_one_rank_started_twice() -> None:
    entries = world("10.0.0.1", "10.0.0.2")
    with pytest.raises(at.RendezvousError, match="has taken rank 1"):
        judged(entries, own=entries[1]._replace(incarnation=99))


def test_two_ranks_with_one_engine() -> None:
    entries = world("10.0.0.1", "10.0.0.2")
    entries[1] = entries[1]._replace(address=entries[0].address)
    with pytest.raises(at.RendezvousError, match="ranks 0 and 1 both"):
        judged(entries)


def test_two_sizes_of_the_world() -> None:
    entries = world("10.0.0.1", "10.0.0.2", "10.0.0.3")
    entries[2] = entries[2]._replace(size=4)
    with pytest.raises(at.RendezvousError, match="rank 2 came for a world of 4, this one for 3"):
        judged(entries)


def test_loopback_addresses_are_good_on_one_host_only() -> None:
    entries = world("127.0.0.1", "localhost")
    assert judged(entries)
    entries[1] = entries[1]._replace(place="there")
    with pytest.raises(at.RendezvousError, match=r"ranks 0, 1 gave loopback[^$]*hint: open_engine"):
        judged(entries)


@pytest.mark.parametrize("listen", ["0.0.0.0:1", "[::]:1"])
def test_an_engine_that_listens_everywhere_has_no_address_to_give(listen: str) -> None:
    with pytest.raises(at.ConfigurationError, match="listen_address"):
        check_place(0, 1, at.Address.parse(listen))


@pytest.mark.parametrize(
    ("rank", "size", "error"), [(2, 2, ValueError), (-1, 2, ValueError), (True, 2, TypeError), (0, "2", TypeError)]
)
def test_a_rank_lies_in_its_world(rank: int, size: int, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"rank|world_size"):
        check_place(rank, size, at.Address("10.0.0.1", 1))


def test_a_digest_depends_on_every_entry_and_the_order() -> None:
    assert len({digest([b"a", b"b"]), digest([b"b", b"a"]), digest([b"a"]), digest([b"a", b"c"])}) == 4


def test_missing_ranks_are_named_but_not_all_of_a_thousand() -> None:
    assert named([3]) == "rank 3"
    assert named(range(1000)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 992 more"


def test_torchruns_variables() -> None:
    launch = Launch.parse(TORCHRUN)
    assert (launch.rank, launch.size, launch.host, launch.port, launch.hosts_store) == (1, 4, "10.0.0.1", 29500, False)
    assert not launch.one_host
    assert Launch.parse(TORCHRUN | {"LOCAL_WORLD_SIZE": "4"}).one_host
    assert Launch.parse(TORCHRUN | {"MASTER_ADDR": "localhost"}).one_host


def test_rank_0_makes_the_store_unless_torchruns_agent_has_one() -> None:
    first = TORCHRUN | {"RANK": "0"}
    assert Launch.parse(first).hosts_store
    assert not Launch.parse(first | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).hosts_store


def test_each_restart_has_keys_of_its_own() -> None:
    agent = TORCHRUN | {"TORCHELASTIC_RUN_ID": "job"}
    prefixes = {Launch.parse(agent | {"TORCHELASTIC_RESTART_COUNT": str(count)}).prefix for count in range(3)}
    assert prefixes == {"job/0/", "job/1/", "job/2/"}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"RANK": ""}, "RANK is not set"),
        ({"RANK": "x"}, "no number"),
        ({"RANK": "4"}, "not below"),
        ({"MASTER_PORT": "-1"}, "no number"),
        ({"MASTER_PORT": "0"}, "no port"),
    ],
)
def test_variables_that_make_no_sense(change: dict[str, str], text: str) -> None:
    with pytest.raises(at.ConfigurationError, match=text):
        Launch.parse(TORCHRUN | change)
