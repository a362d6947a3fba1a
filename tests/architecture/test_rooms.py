"""Private names between rooms and between folders: none is changed from another one, and only those listed here are read."""

from __future__ import annotations

import functools

import pytest

from tests.architecture.private import across_rooms
from tests.architecture.sources import ROOT, Finding, package

READ = {  # by the file that defines them
    # The ground, which every room is given. These are no names of users, and `Engine` is one of these objects.
    "aiotransfer/engine/runtime/runtime.py": "_check _check_loop _closing _flight _lane _lane_is_freed _loop _never_retrieved "
    "_not_here _on_loop _p _platform _progress _revocations _seconds _shut _spend_budget _state _tell_left_out _timeout "
    "_yield_due",
    # A peer is what users see and what rooms above tell and ask; users are not to see that.
    "aiotransfer/engine/peers/peer.py": "_asked_for _asks _awaited_by _channel _check_other _check_up _depend _dies _ended "
    "_engine _error _event _forget _holds _holds_no_more _leases _lookups _lose _path _paths _reply _state",
    # So is a region. On the way of a write `_engine`, `_id`, `_root` and `_start` are read with no function between.
    "aiotransfer/engine/memory/region.py": "_add_keeper _address _closed _device _engine _id _keep _number _release_keeper _root "
    "_staging _start _writable",
    "aiotransfer/model/descriptor.py": "_box _grant _start",
    "aiotransfer/engine/operations/operations.py": "_submitter",
    "aiotransfer/engine/operations/plan.py": "_targets",
    # Of objects whose class does not follow from annotations.
    "": "_abandon _changed _check _close _end _engine _finish _keep _let_go _number _p _path _paths _peer_gone _peers _settle "
    "_shut _stage _staging _start _state _targets _users _withdraw",
}  # fmt: skip

READ_ELSEWHERE = {  # by the folder that reads, its rooms included; the same of folders other than the engine
    "kv": {"aiotransfer/engine/engine.py": "_values", "": "_path"},  # counters of requests; whether a peer ever had a path
    "moe": {  # what ranks that meet, leave and come back ask of peers, and what the way of a row reads with no call between
        "aiotransfer/engine/engine.py": "_connections",
        "aiotransfer/engine/peers/peer.py": "_check_other _depend",
        "aiotransfer/engine/runtime/runtime.py": "_check",
        "": "_forget _lane _loop",
    },
    "cli": {"": "_loop"},
    "testing": {"aiotransfer/engine/engine.py": "_engines", "": "_lane _regions _state"},  # what is left of engines
}


@functools.cache
def found() -> dict[str, tuple[dict[str, set[str]], list[Finding]]]:
    return across_rooms(package())


@pytest.mark.parametrize("path", READ)
def test_rooms_read_the_private_names_that_are_listed_and_no_others(path: str) -> None:
    assert found()["engine"][0].get(path, set()) == set(READ[path].split())


def test_rooms_read_private_names_of_no_other_file() -> None:
    assert set(found()["engine"][0]) == set(READ)


def test_other_folders_read_the_private_names_that_are_listed_and_no_others() -> None:
    reads = {
        folder: {path: " ".join(sorted(names)) for path, names in found()[folder][0].items()}
        for folder in found()
        if folder != "engine"
    }
    assert {folder: names for folder, names in reads.items() if names} == READ_ELSEWHERE


def test_no_room_or_folder_changes_a_private_name_of_another() -> None:
    assert [one for _, writes in found().values() for one in writes] == []


ONE_MORE = {  # reads and changes of a peer, where none of them is allowed
    "engine/operations/submit.py": "peer._dying",
    "engine/operations/deferred.py": "peer._state = 'up'",
    "engine/sync/counter.py": "peer._leases.clear()",
    "weights/publisher/sending.py": "peer._leases",
    "moe/step/step.py": "del peer._leases",
}


def test_one_access_more_in_this_tree_is_seen() -> None:
    files = {one.path: (ROOT / one.path).read_text() for one in package().values()}
    for path, line in ONE_MORE.items():
        text = f"\n\ndef late(peer: Peer) -> None:\n    from aiotransfer.engine.peers.peer import Peer\n    {line}\n"
        files[f"aiotransfer/{path}"] += text
    after = across_rooms(package(files))
    peer = "aiotransfer/engine/peers/peer.py"
    assert after["engine"][0][peer] - found()["engine"][0][peer] == {"_dying"}
    assert after["weights"][0] == {peer: {"_leases"}}
    assert [one.where.partition(":")[0].partition("/")[2] for _, writes in after.values() for one in writes] == [
        path for path, line in sorted(ONE_MORE.items()) if line not in ("peer._dying", "peer._leases")
    ]


TREE = {
    "aiotransfer/engine/low/a.py": "class A:\n    def __init__(self):\n        self._own = []\n",
    "aiotransfer/engine/low/b.py": "from aiotransfer.engine.low.a import A\ndef f(a: A):\n    a._own = 1\n",
}


@pytest.mark.parametrize("where", ["aiotransfer/engine/high/c.py", "aiotransfer/engine/c.py"])
@pytest.mark.parametrize("line", ["a._own = 1", "a._own.append(1)", "del a._own", "a._own", "print(a._own)"])
def test_what_a_room_reads_and_changes_of_another_is_seen(where: str, line: str) -> None:
    text = f"from aiotransfer.engine.low.a import A\ndef f(a: A):\n    {line}\n"
    reads, writes = across_rooms(package(TREE | {where: text}))["engine"]
    if line in ("a._own", "print(a._own)"):
        assert (reads, writes) == ({"aiotransfer/engine/low/a.py": {"_own"}}, [])
    else:
        assert reads == {}
        assert [(one.room, one.where) for one in writes] == [(where.split("/", 1)[1].rpartition("/")[0], f"{where}:3")]


def test_what_a_room_does_with_its_own_private_names_is_left_alone_and_what_other_folders_do_is_theirs() -> None:
    elsewhere = "from aiotransfer.engine.low.a import A\ndef f(a: A):\n    a._own\n"
    assert across_rooms(package(TREE)) == {}
    found = across_rooms(package(TREE | {"aiotransfer/kv/a.py": elsewhere}))
    assert found == {"kv": ({"aiotransfer/engine/low/a.py": {"_own"}}, [])}
