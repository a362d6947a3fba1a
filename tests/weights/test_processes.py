"""Trainers and inference ranks in processes of their own: over each path, killed and stopped in the middle of a version."""

from __future__ import annotations

import signal

import pytest

from tests.needs import needs_tcp
from tests.weights.processes import CONFIG, World

pytestmark = pytest.mark.timeout(180)
SIGNALS = [signal.SIGKILL, signal.SIGSTOP]
RATE = 1000.0  # bytes a second, at which a version takes about a second


@pytest.mark.parametrize("providers", ["shm", pytest.param("tcp", marks=needs_tcp())])
def test_versions_come_whole_to_other_processes(providers: str) -> None:
    with World(providers=providers) as world:
        world.train(None, None)
        servers = world.serve("a", None, None)
        for number in (1, 2, 5):
            assert world.publish(number) == [{"version": [1, number]}] * 2
            for server in servers:
                assert server.look() == {"version": [1, number], "holds": number, "paths": [providers]}


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("providers", ["shm", pytest.param("tcp", marks=needs_tcp())])
def test_a_subscriber_that_is_killed_or_stopped_keeps_its_instance_back_and_no_other(providers: str, number: int) -> None:
    with World(providers=providers) as world:
        world.train(None, None)
        (alone,) = world.serve("a", None)
        mate, victim = world.serve("b", None, None)
        assert world.publish(1) == [{"version": [1, 1]}] * 2
        assert victim.look()["holds"] == 1
        world.enter(2, rate=RATE)
        victim.process.send_signal(number)
        for said in world.leave():
            assert said["error"] == "UpdateError"
            assert said["version"] == [1, 2]
            assert said["committed"] == ["a/0"]
            assert set(said["missing"]) == {"b/0", "b/1"}
        assert alone.look() | {"paths": []} == {"version": [1, 2], "holds": 2, "paths": []}
        assert mate.look() | {"paths": []} == {"version": [1, 1], "holds": 1, "paths": []}
        victim.close()
        (again,) = world.serve("b", None, rank=1)
        again.tell("look")  # it is answered when a whole version is there
        for said in world.publish(3):
            assert said == {"version": [1, 3]}
        assert again.hear()["holds"] == alone.look()["holds"] == mate.look()["holds"] == 3


@pytest.mark.parametrize(
    ("providers", "number"),
    [("shm", signal.SIGKILL), ("shm", signal.SIGSTOP), pytest.param("tcp", signal.SIGSTOP, marks=needs_tcp())],
)
def test_instances_pass_parts_on_to_one_another_and_one_that_is_lost_holds_up_no_other(providers: str, number: int) -> None:
    with World(providers=providers, fanout="relay") as world:
        world.train(None, None)
        places = {name: world.serve(name, None, None) for name in "abc"}
        for version in (1, 2, 5):
            assert world.publish(version) == [{"version": [1, version]}] * 2
            for server in (server for servers in places.values() for server in servers):
                assert server.look() == {"version": [1, version], "holds": version, "paths": [providers]}
        world.enter(6, rate=RATE)
        places["a"][0].process.send_signal(number)
        for said in world.leave():
            assert said["error"] == "UpdateError"
            assert set(said["missing"]) == {"a/0", "a/1"}
        for server in (*places["b"], *places["c"]):
            assert server.look() | {"paths": []} == {"version": [1, 6], "holds": 6, "paths": []}


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_trainer_that_is_killed_or_stopped_ends_the_version_and_new_trainers_go_on(rank: int, number: int) -> None:
    with World(providers="shm") as world:
        trainers = world.train(None, None)
        servers = world.serve("a", None, None)
        assert world.publish(7) == [{"version": [1, 7]}] * 2
        world.enter(8, rate=RATE)
        trainers[rank].process.send_signal(number)
        (said,) = world.leave(trainers[rank])
        assert said["error"] == "UpdateError"
        assert said["committed"] == []
        for server in servers:
            assert server.look() | {"paths": []} == {"version": [1, 7], "holds": 7, "paths": []}
        for trainer in trainers:
            trainer.close()
        world.train(None, None)
        for server in servers:
            server.tell(f"connect {world.trainers[0].address}")
            assert server.hear() == {"connected": world.trainers[0].address}
        assert world.publish(1) == [{"version": [2, 1]}] * 2
        for server in servers:
            assert server.look() | {"paths": []} == {"version": [2, 1], "holds": 1, "paths": []}


@pytest.mark.parametrize("side", ["trainer", "server"])
@pytest.mark.parametrize("providers", ["shm", pytest.param("tcp", marks=needs_tcp())])
def test_a_blocked_loop_on_either_side_delays_a_version_and_loses_nobody(providers: str, side: str) -> None:
    with World(providers=providers) as world:
        trainers = world.train(None, None)
        servers = world.serve("a", None, None)
        assert world.publish(1) == [{"version": [1, 1]}] * 2
        world.enter(2, rate=RATE)
        blocked = (trainers if side == "trainer" else servers)[1]
        blocked.tell(f"block {CONFIG['peer_timeout'] + 1}")  # longer than a silent peer is waited for
        assert world.leave() == [{"version": [1, 2]}] * 2
        assert [server.look()["holds"] for server in servers] == [2, 2]
