"""A relay that is stopped inside a write, as by SIGSTOP, holds up no other instance, and changes nothing that readers see."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

import aiotransfer as at
from aiotransfer import weights
from aiotransfer.testing.fabric import Fabric, fabric
from aiotransfer.weights.subscriber import relaying
from aiotransfer.weights.subscriber.relayed import Relayed
from tests.weights.party import Party, Server
from tests.weights.processes import CONFIG as PROCESSES
from tests.weights.processes import World

CONFIG = at.Config(peer_timeout=0.05, drain_timeout=0.01)
SECONDS = 2.0  # of the simulator, as all times here
MODES = ("double", "in_place")


class Stage:
    """Two trainer ranks and the instances a, b and c of two ranks each. `relay` is stopped inside a write to `target`."""

    def __init__(self, net: Fabric, party: Party) -> None:
        self.net, self.party = net, party
        self.relay: Server | None = None
        self.target: Server | None = None
        self.leases: list[Any] = []

    @property
    def servers(self) -> list[Server]:
        return [server for servers in self.party.instances.values() for server in servers]

    @property
    def others(self) -> list[Server]:
        """Of the instances without the relay."""
        assert self.relay is not None
        return [server for server in self.servers if server.subscriber.instance != self.relay.subscriber.instance]

    def stop_the_first(self, patch: pytest.MonkeyPatch) -> None:
        """The first relay of which a write has landed by half is stopped."""
        ready = Relayed.ready

        def watch(lease: Any, target: Server) -> None:
            if self.relay is not None or lease.state != "active":
                return
            if target.engine._lane.grant_active(lease._grant.slot):
                (self.relay,) = (one for one in self.servers if one.engine.incarnation == lease.peer.incarnation)
                self.target = target
                self.net.hold(self.relay.engine, True)
            else:
                self.net.loop.call_soon(watch, lease, target)

        def watched(relayed: Relayed, peer: Any, message: Any) -> None:
            ready(relayed, peer, message)
            (target,) = (one for one in self.servers if one.subscriber.context is relayed._arrivals._context)
            _, leases = relayed._let.get(message.number, (None, []))
            self.leases += leases
            for lease in leases:
                watch(lease, target)

        patch.setattr(Relayed, "ready", watched)

    async def publish(self, number: int) -> list[BaseException | None]:
        """How it ended at each trainer rank."""
        tasks = [asyncio.ensure_future(trainer.publish(number)) for trainer in self.party.trainers]
        _, late = await asyncio.wait(tasks, timeout=2 * SECONDS)
        assert not late, "an update hangs"
        return [task.exception() for task in tasks]

    def check(self, servers: list[Server], number: int) -> None:
        assert [server.subscriber.version for server in servers] == [(1, number)] * len(servers)
        assert [server.holds() for server in servers] == [number] * len(servers)

    def unproved(self) -> list[Any]:
        return [lease for lease in self.leases if lease.state != "revoked"]


def play(scenario: Callable[[Stage], Any], mode: str, seed: int = 3, **options: Any) -> None:
    """Up to the version 2, in which a relay is stopped inside a write: the other instances have it."""

    async def run(net: Fabric) -> None:
        async def open_engine(**engine: Any) -> at.Engine:
            return await net.open_engine(config=CONFIG, timeout=SECONDS, **engine)

        async with AsyncExitStack() as stack:
            party = Party(stack, open_engine)
            stage = Stage(net, party)
            await party.train(2, timeout=SECONDS, fanout="relay", **options)
            for name in "abc":
                await party.serve(name, 2, mode=mode)
            await party.publish(1)
            with pytest.MonkeyPatch.context() as patch, net.faults(split=1.0):
                stage.stop_the_first(patch)
                began = net.now
                errors = await stage.publish(2)
            assert stage.relay is not None, "no write was under way"
            assert net.now - began < SECONDS
            for error in errors:
                assert isinstance(error, weights.UpdateError)
                assert {name.partition("/")[0] for name in error.missing} == {stage.relay.subscriber.instance}
            stage.check(stage.others, 2)
            assert stage.unproved(), "it is inside a write still"
            await scenario(stage)

    fabric(seed=seed, delay=(1e-5, 1e-4)).run(run)


@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_what_it_writes_when_it_wakes_changes_nothing(mode: str, checksum: bool) -> None:
    async def scenario(stage: Stage) -> None:
        assert stage.relay is not None
        stage.net.hold(stage.relay.engine, False)
        await asyncio.sleep(0.1)
        assert not stage.unproved()
        stage.check(stage.others, 2)
        for number in (3, 4):
            await stage.publish(number)  # the others have given the relay up, which does not know of this one
            stage.check(stage.others, number)

    play(scenario, mode, checksum=checksum)


def test_with_a_second_buffer_further_versions_come_while_it_is_stopped() -> None:
    async def scenario(stage: Stage) -> None:
        assert stage.relay is not None
        for number in (3, 4, 5):
            await stage.publish(number)
            stage.check(stage.others, number)
        assert stage.unproved()
        stage.net.hold(stage.relay.engine, False)
        await asyncio.sleep(0.1)
        assert not stage.unproved()
        stage.check(stage.others, 5)

    play(scenario, "double")


@pytest.mark.parametrize("how", ["wakes", "ends"])
def test_in_place_its_target_keeps_the_version_by_name_until_it_wakes_or_ends(how: str) -> None:
    async def scenario(stage: Stage) -> None:
        assert stage.relay is not None
        assert stage.target is not None
        held = stage.target.subscriber.instance
        (free,) = {server.subscriber.instance for server in stage.others} - {held}
        for error in await stage.publish(3):
            assert isinstance(error, weights.UpdateError)
            assert held in {name.partition("/")[0] for name in error.missing}
            why = error.missing[f"{held}/{stage.target.subscriber.rank}"]
            assert f"{stage.relay.engine.name} was stopped inside a write into these weights" in why
        await asyncio.sleep(0.1)  # until its other rank goes on with the version before, of which nothing was overwritten
        stage.check(stage.party.instances[held], 2)
        stage.check(stage.party.instances[free], 3)
        if how == "wakes":
            stage.net.hold(stage.relay.engine, False)
        else:
            stage.net.kill(stage.relay.engine)
        await asyncio.sleep(0.1)
        assert not stage.unproved()
        await stage.publish(4)
        stage.check(stage.others, 4)

    play(scenario, "in_place")


@pytest.mark.parametrize("mode", MODES)
def test_a_publisher_that_is_stopped_inside_a_write_leaves_an_instance_that_new_ones_bring_on(mode: str) -> None:
    """In place as soon as it has woken or ended: nothing else could make that memory safe."""

    async def run(net: Fabric) -> None:
        async def open_engine(**engine: Any) -> at.Engine:
            return await net.open_engine(config=CONFIG, timeout=SECONDS, **engine)

        async with AsyncExitStack() as stack:
            party = Party(stack, open_engine)
            trainers = await party.train(2, timeout=SECONDS)
            servers = await party.serve("a", 2, mode=mode)
            await party.publish(1)
            stopped = trainers[1].engine

            def watch() -> None:
                for server in servers:
                    for peer in server.engine.peers:
                        for lease in peer._leases:
                            assert isinstance(lease, at.Lease)
                            if peer.incarnation == stopped.incarnation and server.engine._lane.grant_active(lease._grant.slot):
                                net.hold(stopped, True)
                                return
                net.loop.call_soon(watch)

            with net.faults(split=1.0):
                tasks = [asyncio.ensure_future(trainer.publish(2)) for trainer in trainers]
                watch()
                with pytest.raises(weights.UpdateError):
                    await tasks[0]
            await asyncio.sleep(0.1)
            expected = (1, 1) if mode == "double" else None
            assert [server.subscriber.version for server in servers] == [expected] * 2
            await trainers[0].publisher.aclose()
            net.kill(stopped)
            await asyncio.gather(*tasks, return_exceptions=True)
            await party.train(2, timeout=SECONDS)
            for server in servers:
                await server.engine.connect(party.trainers[0].engine.address)
            await asyncio.sleep(0.1)
            assert await party.publish(1) == (2, 1)
            assert [server.holds() for server in servers] == [1, 1]

    fabric(seed=5, delay=(1e-5, 1e-4)).run(run)


class Withheld:
    """A call whose copy waits for a page of its own source, and has been given up."""

    nbytes = 0
    over = False

    def cancel(self) -> None:
        pass

    async def landed(self) -> None:
        raise at.QuarantineError("a page of its source is withheld")

    def source_in_use(self) -> bool:
        return not self.over


@pytest.mark.parametrize("mode", MODES)
def test_a_relay_whose_own_memory_is_still_read_takes_no_version_that_would_change_what_is_read(mode: str) -> None:
    """The copy would write bytes of that version into a receiver that has the one before whole."""
    calls: list[Withheld] = []

    async def withheld(*arguments: Any) -> Withheld:
        calls.append(Withheld())
        return calls[-1]

    async def run(net: Fabric) -> None:
        async def open_engine(**engine: Any) -> at.Engine:
            return await net.open_engine(config=CONFIG, timeout=SECONDS, **engine)

        async with AsyncExitStack() as stack:
            party = Party(stack, open_engine)
            await party.train(2, timeout=SECONDS, fanout="relay")
            for name in "ab":
                await party.serve(name, 2, mode=mode)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(relaying, "post", withheld)
                assert await party.publish(1) == (1, 1)
            assert calls, "nothing was passed on"
            tasks = [asyncio.ensure_future(trainer.publish(2)) for trainer in party.trainers]
            await asyncio.wait(tasks)
            for task in tasks:
                error = task.exception()
                assert isinstance(error, weights.UpdateError)
                assert any("a page of these weights is withheld from a copy to" in why for why in error.missing.values())
            servers = [server for name in "ab" for server in party.instances[name]]
            assert [(server.subscriber.version, server.holds()) for server in servers] == [((1, 1), 1)] * 4
            Withheld.over = True
            assert await party.publish(3) == (1, 3)
            assert [server.holds() for server in servers] == [3] * 4

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Withheld, "over", False)
        fabric(seed=11, delay=(1e-5, 1e-4)).run(run)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("mode", MODES)
def test_a_process_that_is_stopped_inside_a_write_into_shared_memory(mode: str, tmp_path: Path) -> None:
    config = {**PROCESSES, "inline_bytes": 1}  # native threads write, so that the loop of the relay goes on
    with World(providers="shm", fanout="relay", mode=mode, timeout=20, config=config) as world:
        world.train(None, None)
        places = {name: world.serve(name, None, None) for name in "abc"}
        others = [*places["b"], *places["c"]]
        assert world.publish(1) == [{"version": [1, 1]}] * 2
        relay, go_on = places["a"][0], tmp_path / "go"
        relay.tell(f"hold {go_on}")
        world.enter(2, rate=1000.0)
        assert relay.hear() == {"held": str(go_on)}
        relay.process.send_signal(signal.SIGSTOP)
        for said in world.leave():
            assert said["error"] == "UpdateError"
            assert set(said["missing"]) == {"a/0", "a/1"}
        seen = {"version": [1, 2], "holds": 2, "paths": ["shm"]}
        assert [server.look() for server in others] == [seen] * 4
        if mode == "double":
            world.publish(3)
            seen = {"version": [1, 3], "holds": 3, "paths": ["shm"]}
            assert [server.look() for server in others] == [seen] * 4
        go_on.touch()
        relay.process.send_signal(signal.SIGCONT)
        for server in others:
            server.tell("settle")
            assert server.hear() == {"settled": True}
        assert [server.look() for server in others] == [seen] * 4
        for number in (5, 6, 7):  # who has not heard of the relay for long may give it up once more
            relay.tell(f"connect {world.trainers[0].address}")
            assert relay.hear() == {"connected": world.trainers[0].address}
            ends = world.publish(number)
            if not any("error" in end for end in ends):
                break
        assert ends == [{"version": [1, number]}] * 2
        assert [server.look()["holds"] for server in (*places["a"], *others)] == [number] * 6
