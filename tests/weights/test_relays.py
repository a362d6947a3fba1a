"""Instances pass parts on to one another: the trainers write the bytes of one, and no relay holds up another instance."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer import weights
from aiotransfer.engine.memory.views import memory_of
from aiotransfer.errors import again
from aiotransfer.testing.fabric import Fabric, fabric
from aiotransfer.weights import Bound, Cast, Layout, Piece, Tensor
from aiotransfer.weights.roles.posting import Batch
from aiotransfer.weights.subscriber.arrivals import Arrivals
from aiotransfer.weights.subscriber.relayed import Relayed
from aiotransfer.weights.subscriber.relaying import Relaying
from tests.weights.party import Party, Server, failures

CONFIG = at.Config(peer_timeout=0.05, drain_timeout=0.01)
MODES = ("double", "in_place")
NAMES = "abcd"
Scenario = Callable[[Party, Fabric], Awaitable[Any]]


def play(scenario: Scenario, seed: int = 7, timeout: float = 2) -> Any:
    """Run it with a party on the simulator."""

    async def run(net: Fabric) -> Any:
        async def open_engine(**options: Any) -> at.Engine:
            return await net.open_engine(config=CONFIG, timeout=timeout, **options)

        async with AsyncExitStack() as stack:
            return await scenario(Party(stack, open_engine), net)

    return fabric(seed=seed).run(run)


async def publish(party: Party, number: int) -> int:
    """Publish it everywhere; bytes that the trainers wrote."""

    async def one(trainer: Any) -> int:
        trainer.load(number)
        async with trainer.publisher.publish(number) as update:
            pass
        return int(update.nbytes_sent)

    return sum(await asyncio.gather(*map(one, party.trainers)))


async def serve(party: Party, instances: int, ranks: int = 2, mode: str = "double") -> list[Server]:
    return [server for name in NAMES[:instances] for server in await party.serve(name, ranks, mode=mode)]


def check(servers: list[Server], number: int) -> None:
    for server in servers:
        assert server.subscriber.version == (1, number)
        assert server.holds() == number


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that ranks have passed on, one entry for each and version."""
    found: list[int] = []
    whole = Relaying.close

    async def close(self: Relaying) -> None:
        await whole(self)
        found.append(self.nbytes)

    monkeypatch.setattr(Relaying, "close", close)
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("instances", [1, 2, 3, 4])
def test_the_trainers_write_the_bytes_of_one_instance(instances: int, mode: str, passed: list[int]) -> None:
    async def scenario(party: Party, net: Fabric) -> None:
        await party.train(2, timeout=2, fanout="relay")
        servers = await serve(party, instances, mode=mode)
        one = sum(sum(server.subscriber.memory.sizes.values()) for server in servers[:2])
        for number in (1, 2, 5):
            passed.clear()
            assert await publish(party, number) == one
            check(servers, number)
            assert sum(passed) == one * (instances - 1)

    play(scenario)


def test_instances_that_are_cut_differently_get_from_the_trainers_what_none_has_in_one_piece() -> None:
    async def scenario(party: Party, net: Fabric) -> None:
        await party.train(3, timeout=2, fanout="relay")
        servers = [*await party.serve("a", 4), *await party.serve("b", 1), *await party.serve("c", 2)]
        for number in (1, 2):
            await publish(party, number)
            check(servers, number)

    play(scenario)


@pytest.mark.parametrize("mode", MODES)
def test_checksums_hold_for_what_was_passed_on(mode: str) -> None:
    async def scenario(party: Party, net: Fabric) -> None:
        await party.train(2, timeout=2, fanout="relay", checksum=True)
        servers = await serve(party, 3, mode=mode)
        for number in (1, 2):
            await publish(party, number)
            check(servers, number)

    play(scenario)


def test_what_a_relay_damages_is_found_by_its_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(party: Party, net: Fabric) -> None:
        await party.train(2, timeout=2, fanout="relay", checksum=True)
        servers = await serve(party, 2, ranks=1)
        await publish(party, 1)
        whole = Relaying._post

        async def post(self: Relaying, batch: Batch, *rest: Any) -> Any:
            region, begin, _ = batch.by_source()[0]
            memory_of(region)[int(batch.writes.source_offset[begin])] ^= 1
            return await whole(self, batch, *rest)

        monkeypatch.setattr(Relaying, "_post", post)
        for error in await failures(party, 2):
            assert isinstance(error, weights.UpdateError)
            assert any("checksum" in why for why in error.missing.values())
        monkeypatch.undo()
        await publish(party, 3)
        check(servers, 3)

    play(scenario)


@pytest.mark.parametrize("staging_bytes", [4096, 1 << 20])
def test_what_is_made_on_the_way_is_passed_on_part_by_part(staging_bytes: int) -> None:
    source = np.random.default_rng(7).normal(size=(96, 40)).astype(np.float32)
    trainer = Layout([Tensor("w", (96, 40), "float32")], [Piece("w", r, (48 * r, 0), (48, 40)) for r in range(2)], ranks=2)
    inference = Layout([Tensor("w", (96, 40), "float16")], [Piece("w", r, (0, 20 * r), (96, 20)) for r in range(2)], ranks=2)

    async def scenario(party: Party, net: Fabric) -> None:
        engines = [await party.stack.enter_async_context(await party.open_engine()) for _ in range(2)]
        members = [str(engine.address) for engine in engines]
        publishers = []
        for rank, engine in enumerate(engines):
            bound = Bound(trainer, rank, {"w": source[48 * rank : 48 * rank + 48].copy()})
            publisher = weights.Publisher(
                engine,
                bound,
                group=engine.group(members),
                timeout=2,
                rules=[Cast("w")],
                staging_bytes=staging_bytes,
                fanout="relay",
            )
            publishers.append(await party.stack.enter_async_context(publisher))
        subscribers = []
        for name in NAMES[:3]:
            for rank in range(2):
                engine = await party.stack.enter_async_context(await party.open_engine())
                await engine.connect(engines[0].address)
                one = weights.Subscriber(engine, inference, instance=name, rank=rank)
                subscribers.append(await party.stack.enter_async_context(one))

        async def push(publisher: weights.Publisher, number: int) -> int:
            async with publisher.publish(number) as update:
                pass
            return int(update.nbytes_sent)

        for number in (1, 2):
            assert sum(await asyncio.gather(*(push(publisher, number) for publisher in publishers))) == 96 * 40 * 2
            for subscriber in subscribers:
                part = slice(20 * subscriber.rank, 20 * subscriber.rank + 20)
                assert np.array_equal(subscriber.tensors["w"], source[:, part].astype(np.float16))
        # instance a passes nothing on any more: the parts are made again
        for subscriber in subscribers[:2]:
            subscriber.routes.get = _never  # type: ignore[method-assign]
        source[:] += 1
        for rank, publisher in enumerate(publishers):
            publisher.sources._bound.memory["w"][:] = source[48 * rank : 48 * rank + 48]
        assert sum(await asyncio.gather(*(push(publisher, 3) for publisher in publishers))) > 96 * 40 * 2
        for subscriber in subscribers:
            part = slice(20 * subscriber.rank, 20 * subscriber.rank + 20)
            assert np.array_equal(subscriber.tensors["w"], source[:, part].astype(np.float16))

    play(scenario)


async def _never(*arguments: Any) -> bytes:
    await asyncio.sleep(1000)
    return b""


def test_a_part_of_the_names_is_passed_on() -> None:
    tensors = [Tensor(name, (64,), "float32") for name in ("base", "lora", "lorb")]
    layout = Layout(tensors, [Piece(tensor.name, 0) for tensor in tensors], ranks=1)

    async def scenario(party: Party, net: Fabric) -> None:
        memory = {tensor.name: np.ones(64, np.float32) for tensor in tensors}
        subscribers = []
        for name in NAMES[:2]:
            engine = await party.stack.enter_async_context(await party.open_engine())
            one = weights.Subscriber(engine, layout, instance=name)
            subscribers.append(await party.stack.enter_async_context(one))
        for number, names in ((1, None), (2, ["lora", "lorb"])):
            async with await party.open_engine() as left:
                for subscriber in subscribers:
                    await subscriber.engine.connect(left.address)
                await asyncio.sleep(0.1)  # until the one that was dialled knows it
                async with weights.Publisher(left, layout.bind(0, memory), timeout=2, names=names, fanout="relay") as publisher:
                    async with publisher.publish(number) as update:
                        pass
                    assert update.nbytes_sent == 256 * (3 if names is None else 2)
            for array in memory.values():
                array += 1
        for subscriber in subscribers:
            assert [float(subscriber.tensors[name][5]) for name in ("base", "lora", "lorb")] == [1, 2, 2]

    play(scenario)


def test_an_instance_that_comes_late_catches_up_and_then_takes_part() -> None:
    async def scenario(party: Party, net: Fabric) -> None:
        await party.train(2, timeout=2, fanout="relay")
        servers = await serve(party, 2)
        await publish(party, 1)
        late = await party.serve("d", 2)
        for server in late:
            assert await server.subscriber.ready(timeout=5) == (1, 1)
        check([*servers, *late], 1)
        one = sum(sum(server.subscriber.memory.sizes.values()) for server in late)
        assert await publish(party, 2) == one
        check([*servers, *late], 2)

    play(scenario)


# ---- relays that do not pass on what they should ----


def lose(victim: int, point: int, how: str, mode: str) -> bool:
    """Something happens to a rank of the six of a, b and c some turns after an update began. Whether it missed the version."""

    async def scenario(party: Party, net: Fabric) -> bool:
        trainers = await party.train(2, timeout=2, fanout="relay")
        servers = await serve(party, 3, mode=mode)
        await publish(party, 1)
        place, closing = servers[victim], []
        tasks = [asyncio.ensure_future(trainer.publish(2)) for trainer in trainers]

        def strike() -> None:
            if how == "kill":
                net.kill(place.engine)
            elif how == "hold":
                net.hold(place.engine, True)
            else:
                closing.append(asyncio.ensure_future(place.subscriber.aclose()))

        net.at_turn(point, strike)
        done, late = await asyncio.wait(tasks, timeout=4)
        assert not late, "hang"
        own = place.subscriber.instance
        others = [server for server in servers if server.subscriber.instance != own]
        errors = [again(error) for error in (task.exception() for task in done) if error is not None]
        assert {server.subscriber.version for server in others} == {(1, 2)}, errors
        check(others, 2)
        for error in errors:
            assert isinstance(error, weights.UpdateError)
            assert set(error.committed) >= {f"{name}/{rank}" for name in "abc" if name != own for rank in range(2)}
            assert {name.partition("/")[0] for name in error.missing} == {own}
        if how == "hold":
            net.hold(place.engine, False)
        await asyncio.gather(*closing, asyncio.sleep(1))
        mate = next(server for server in servers if server.subscriber.instance == own and server is not place)
        assert mate.subscriber.version in ((1, 1), (1, 2), None)
        if mate.subscriber.version is not None:
            assert mate.holds() == mate.subscriber.version.number
        return bool(errors)

    return bool(play(scenario, seed=point))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["kill", "hold", "close"])
def test_a_rank_that_is_lost_at_any_point_holds_up_no_other_instance(how: str, mode: str) -> None:
    points = range(0, 240, 8) if how == "kill" else range(3, 240, 16)
    struck = [lose(number % 6, point, how, mode) for number, point in enumerate(points)]
    assert any(struck)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("instances", [2, 3])
def test_the_trainers_write_what_a_rank_does_not_pass_on(instances: int, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(party: Party, net: Fabric) -> None:
        await party.train(2, timeout=4, fanout="relay")
        servers = await serve(party, instances, mode=mode)
        one = sum(sum(server.subscriber.memory.sizes.values()) for server in servers[:2])
        for server in servers[:2]:
            server.subscriber.routes.get = _never  # type: ignore[method-assign]
        for number in (1, 2):
            began = net.now
            assert one < await publish(party, number) < one * instances
            assert net.now - began < 1.5, "within their timeout, not at the deadline"
            check(servers, number)

    play(scenario)


@pytest.mark.parametrize("mode", MODES)
def test_a_slow_relay_is_put_out_before_another_one_writes_in_its_place(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The relay writes on all the while: what it has under way when its right is taken back ends before others begin."""

    async def scenario(party: Party, net: Fabric, seconds: float) -> int:
        await party.train(2, timeout=4, fanout="relay")
        servers = await serve(party, 3, mode=mode)
        one = sum(sum(server.subscriber.memory.sizes.values()) for server in servers[:2])
        slow = servers[0].subscriber.engine
        whole = Relaying._post

        async def post(self: Relaying, *arguments: Any) -> Any:
            if self._context.engine is slow:
                await asyncio.sleep(seconds)
            return await whole(self, *arguments)

        ready, granted = Relayed.ready, Arrivals.grant_instead
        let: dict[tuple[Arrivals, int], list[Any]] = {}  # the leases of each relay

        def note(self: Relayed, peer: Any, message: Any) -> None:
            ready(self, peer, message)
            let[self._arrivals, message.number] = self._let.get(message.number, (None, []))[1]

        def grant(self: Arrivals, peer: Any, ask: Any, *rest: Any) -> None:
            assert all(lease.state == "revoked" for lease in let.get((self, ask.instead), ()))
            granted(self, peer, ask, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(Relaying, "_post", post)
            patch.setattr(Relayed, "ready", note)
            patch.setattr(Arrivals, "grant_instead", grant)
            sent = [await publish(party, number) for number in (1, 2)]
        check(servers, 2)
        assert await publish(party, 3) == one
        check(servers, 3)
        return max(sent) - one

    more = [
        play(lambda party, net, seconds=seconds: scenario(party, net, seconds), seed=number)  # type: ignore[misc]
        for number, seconds in enumerate((0.0, 0.05, 0.2, 0.24, 0.26, 0.3, 0.5, 3.0))
    ]
    assert more[0] == 0
    assert more[-1] > 0


def test_a_rank_that_cannot_reach_another_is_replaced_by_the_trainers() -> None:
    async def scenario(party: Party, net: Fabric) -> None:
        await party.train(2, timeout=2, fanout="relay")
        servers = await serve(party, 3, ranks=1)
        await publish(party, 1)
        for number, point in enumerate(range(20, 200, 30), 2):
            net.at_turn(point, lambda: net.cut(servers[0].engine, servers[1].engine))
            await publish(party, number)
            check(servers, number)

    play(scenario)


def test_an_instance_that_does_not_take_the_version_passes_nothing_on() -> None:
    async def scenario(party: Party, net: Fabric) -> None:
        await party.train(2, timeout=2, fanout="relay")
        servers = await serve(party, 3)
        await publish(party, 1)
        servers[0].subscriber.stopped.why = lambda: "its memory is not safe"  # type: ignore[method-assign]
        for error in await failures(party, 2):
            assert isinstance(error, weights.UpdateError)
            assert set(error.missing) == {"a/0", "a/1"}
        check(servers[2:], 2)

    play(scenario)


def test_relays_keep_the_rate_that_they_were_told(monkeypatch: pytest.MonkeyPatch) -> None:
    rate = 2000.0
    posted: dict[str, list[tuple[float, int]]] = {}

    async def scenario(party: Party, net: Fabric) -> None:
        await party.train(4, timeout=60, fanout="relay", rate_limit=rate)  # together more than a relay may
        servers = await serve(party, 3, ranks=1)
        whole = Relaying._post

        async def post(self: Relaying, batch: Batch, *rest: Any) -> Any:
            posted.setdefault(self._context.instance, []).append((net.now, batch.nbytes))
            return await whole(self, batch, *rest)

        monkeypatch.setattr(Relaying, "_post", post)
        await publish(party, 1)
        check(servers, 1)

    play(scenario, timeout=60)
    assert len(posted) >= 2
    for calls in posted.values():
        for first, (begin, _) in enumerate(calls):
            for last in range(first, len(calls)):
                written = sum(nbytes for _, nbytes in calls[first:last])
                assert written <= rate * (calls[last][0] - begin + 0.01) + 1


def test_only_ranks_of_the_offer_pass_on() -> None:
    """A subscriber rank that was not named cannot have memory leased, nor one that asks for the wrong place."""

    async def scenario(party: Party, net: Fabric) -> None:
        from aiotransfer.errors import DescriptorError
        from aiotransfer.weights.protocol import relays, wire

        (trainer,) = await party.train(1, timeout=2, fanout="relay")
        a, b = await serve(party, 2, ranks=1)
        trainer.load(1)
        refused = 0
        async with trainer.publisher.publish(1) as update:
            for server in (a, b):
                for session in server.subscriber._sessions.values():
                    for peer in server.engine.peers:
                        for relay in session.offer.passing.relays if session.offer.passing else ():
                            if relay.incarnation != peer.incarnation:
                                with pytest.raises(DescriptorError):
                                    session._filling.relayed.ready(peer, relays.Pass(update.update, 0, relay.number, 0))
                        for number in range(4):
                            with pytest.raises(DescriptorError):
                                session._filling.relayed.ready(peer, relays.Pass(update.update, 0, number + 100, 0))
                            with pytest.raises(DescriptorError):
                                session._filling.relayed.instead(peer, wire.Ask(update.update, 0, 0, number + 100, 1))
                            refused += 1
        assert refused
        check([a, b], 1)

    play(scenario)


def test_the_memory_that_relays_have_mapped_is_let_go_with_its_owner() -> None:
    async def scenario(party: Party, net: Fabric) -> None:
        await party.train(1, timeout=2, fanout="relay")
        a, b = await serve(party, 2, ranks=1)
        for number in (1, 2, 3):
            await publish(party, number)
        assert len(a.subscriber.mappings) == len(b.subscriber.mappings) == 1
        await b.subscriber.aclose()
        await asyncio.sleep(0.1)
        assert len(a.subscriber.mappings) == 0

    play(scenario)
