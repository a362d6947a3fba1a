"""One update as publisher rank 0 conducts it: its members, the offer to the subscribers, and how it ended."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from aiotransfer.errors import TransferError
from aiotransfer.weights.memory.aside import aside
from aiotransfer.weights.protocol import relays, wire
from aiotransfer.weights.protocol.roll import gaps, name_of, stands_in_the_way
from aiotransfer.weights.protocol.version import Version
from aiotransfer.weights.publisher.course import Course, Given, Target
from aiotransfer.weights.publisher.settling import Settling
from aiotransfer.weights.roles.watch import Ending, Watch, reach

if TYPE_CHECKING:
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.weights.publisher.context import Context
    from aiotransfer.weights.publisher.subscribers import Subscribers
    from aiotransfer.weights.publisher.work import Work

LOOK_SECONDS = 0.05  # between two looks for peers that may be subscribers, while there is none
PARTIAL_SECONDS = 0.5  # in which the other ranks of an instance announce themselves, of which some rank has
ACCEPT_SHARE = 1 / 3  # of the time that is left, in which a subscriber must say whether it takes the version
DONE_SHARE = 0.9  # of the time that is left: what subscribers are given, so that their answers come in time
CONNECTS = 32  # at a time
REASON_SECONDS = 0.5  # of the time that is left, in which ranks of an instance that was left out say for themselves why
UNHEARD = "it did not answer in time"


class History:
    """What publisher rank 0 keeps from one update to the next. `epoch`: of these trainers, once a version was
    offered; `last`: the highest number of it that came to an end; `partial`: lives of the ranks of instances
    that were not whole when a version began."""

    def __init__(self) -> None:
        self.epoch: int | None = None
        self.last = -1
        self.partial: dict[str, list[int]] = {}


class Conduct:
    """Runs as a task of its own until every publisher rank has been told the outcome; calls `over()` then.
    `work_of(update)`: the plan of the update, once this rank has made it."""

    def __init__(
        self, context: Context, subscribers: Subscribers, history: History, course: Course,
        work_of: Callable[[int], Work], over: Callable[[], object],
    ) -> None:  # fmt: skip
        self._context, self._subscribers, self._history, self._course = context, subscribers, history, course
        self._work_of, self._over = work_of, over
        self.update, self.enters = course.update, course.enters
        self.settling = Settling(context, course)
        self._planned: dict[int, bytes] = {}
        self._sent: set[int] = set()
        self._has_begun = False  # the publishers' blocks
        self._watch = Watch(context.never, context.mail)
        self.task = context.mail.own(self._run())

    # ---- from beginning to end ----

    async def _run(self) -> None:
        async with Ending(self._end):
            try:
                await self._publish()
            except Given as given:
                if self._course.is_allowed:
                    await self._give_up_late(given)
                else:
                    self._abandon(given)
            except Exception as error:  # nothing may leave the others waiting
                self._abandon(Given("failed", f"publisher rank 0: {type(error).__name__}: {error}"))

    def _end(self) -> None:
        self._watch.close()
        self._over()

    async def _publish(self) -> None:
        context, course = self._context, self._course
        for rank, (peer, _) in self.enters.items():
            if peer is not None:
                self._watch.add(peer, functools.partial(self._rank_lost, rank))
        first = self.enters[0][1]
        for rank, (_, enter) in self.enters.items():
            if enter.digest != first.digest:
                what = "their layout, rules or staging_bytes, or in where their weights are (host, GPU, files)"
                raise Given("plan", f"publisher ranks 0 and {rank} differ in {what}")
            if enter.epoch != first.epoch:
                raise Given("version", f"publisher rank 0 names epoch {first.epoch}, rank {rank} epoch {enter.epoch}")
        instances = await self._instances()
        entries = [entry for entries in instances.values() for entry in entries]
        self._number(first, entries)
        course.targets = {(entry.instance, entry.rank): Target(entry) for entry in entries}
        version = course.version
        for peer, enter in self.enters.values():
            begin = wire.Begin(enter.attempt, self.update, version.epoch, version.number, course.left(), entries)
            course.send(peer, begin)
        if not await course.until(lambda: len(self._planned) == context.ranks):
            raise Given("late", f"publisher ranks {self._without(self._planned)} did not plan in time")
        if len(set(self._planned.values())) > 1:
            raise Given("plan", "publisher ranks made different plans: do all have the same layout and rules?")
        await self._offer()
        self._has_begun = True
        course.tell_ranks(wire.Go(self.update, course.going))
        if self._work_of(self.update).relays:
            is_written, ranks = await self.settling.run(), self.settling.stood
        else:
            is_written, ranks = await course.until(lambda: len(self._sent) == context.ranks), self._sent
        if not is_written:
            raise Given("late", f"publisher ranks {self._without(ranks)} had not written everything in time")
        course.is_allowed = True
        for name in course.going:
            chair = course.targets[name, 0]
            if chair.peer is not None:
                context.tell(chair.peer, wire.Allow(self.update, name))
        await course.until(lambda: all(target.done is not None for target in course.taking()))
        left_out = [target for key, target in course.targets.items() if target.accepted and key[0] not in course.going]
        await course.until(lambda: all(target.done is not None for target in left_out), min(REASON_SECONDS, course.left()))
        self._finish()

    def _rank_lost(self, rank: int, peer: Peer, error: TransferError) -> None:
        self.give("lost", f"publisher rank {rank} was lost: {error.message}")

    def _without(self, ranks: object) -> list[int]:
        return [rank for rank in self.enters if rank not in ranks]  # type: ignore[operator]

    async def _instances(self) -> dict[str, list[wire.Entry]]:
        """Waits for one whole instance. Others that are not whole are waited for briefly, once: what is known
        then takes part."""
        subscribers, history, course = self._subscribers, self._history, self._course
        roll = subscribers.roll
        until = asyncio.get_running_loop().time() + min(PARTIAL_SECONDS, course.left() / 4)
        while True:
            whole = roll.whole()
            partial = {name: [entry.life for entry in some] for name, some in roll.instances().items() if name not in whole}
            is_new = any(history.partial.get(name) != lives for name, lives in partial.items())
            if whole and (not is_new or asyncio.get_running_loop().time() >= until):
                break
            if not course.left():
                known = ", ".join(f"{name}: {gaps(entries)}" for name, entries in roll.instances().items())
                raise Given("late", f"no whole subscriber instance was heard of{': ' + known if known else ''}")
            subscribers.call_new()
            before = roll.entries
            await course.until(functools.partial(self._differs, before), min(LOOK_SECONDS, course.left()))
        history.partial = partial
        for name in partial:
            entries = roll.instances()[name]
            gone = {rank: why for (instance, rank), (_, why) in subscribers.gone.items() if instance == name}
            why = "; ".join(f"rank {rank}: {text}" for rank, text in gone.items()) or gaps(entries)
            course.missing |= {name_of(name, entry.rank): f"its instance is not whole: {why}" for entry in entries}
            course.missing |= {name_of(name, rank): text for rank, text in gone.items()}
        return whole

    def _differs(self, before: list[wire.Entry]) -> bool:
        return self._subscribers.roll.entries != before

    def _number(self, enter: wire.Enter, entries: list[wire.Entry]) -> None:
        history, roll, context = self._history, self._subscribers.roll, self._context
        epoch = history.epoch or enter.epoch or roll.epoch()
        if not enter.epoch and any(entry.epoch == epoch and entry.trainer not in (0, context.life) for entry in entries):
            epoch = roll.epoch()  # trainers that are gone had offered it to a subscriber that was not there then
        self._course.version = version = Version(epoch, enter.number)
        if epoch == history.epoch and enter.number <= history.last:
            raise Given(
                "version", f"version {version} is not higher than {Version(epoch, history.last)}", Version(epoch, history.last)
            )
        if (stands := stands_in_the_way(entries, version, context.life)) is not None:
            who, has = name_of(stands.instance, stands.rank), Version(stands.epoch, stands.number)
            why = "" if has >= version else f" of other trainers, and epoch {version.epoch} is theirs"
            raise Given("version", f"version {version} cannot be published: subscriber {who} knows {has}{why}", has)

    # ---- the subscribers ----

    async def _offer(self) -> None:
        """Ask every rank of every instance that fits; returns when enough is known of each."""
        context, course, history = self._context, self._course, self._history
        work = self._work_of(self.update)
        for (name, _), target in course.targets.items():
            if name in work.misfits:
                course.missing[target.name] = f"its layout does not fit: {work.misfits[name][0]}"
        course.targets = {key: target for key, target in course.targets.items() if key[0] not in work.misfits}
        limit = asyncio.Semaphore(CONNECTS)
        members: dict[str, list[str]] = {}
        for (name, _), target in course.targets.items():
            members.setdefault(name, []).append(target.entry.address)
        seconds = course.left() * DONE_SHARE
        if work.relays:
            await aside(context.engine, work.offered)
        tasks = []
        for (name, rank), target in course.targets.items():
            passing = self.settling.passing(work, name, rank)
            counts = work.expected(name, rank) if passing is None else self.settling.counts(work, passing)
            senders = [wire.Sender(s, self._incarnation(s), of) for s, of in sorted(counts.items())]
            offer = wire.Offer(
                self.update, target.entry.life, context.life, course.version.epoch, course.version.number, seconds,
                members[name], senders, work.names(name), "", "", context.checksum, passing,
            )  # fmt: skip
            tasks.append(context.mail.own(self._offer_to(target, offer, limit)))
        try:
            await course.until(
                lambda: all(target.accepted or target.done is not None for target in course.targets.values()),
                course.left() * ACCEPT_SHARE,
            )
        finally:
            for task in tasks:
                task.cancel()
        out = {name for (name, _), target in course.targets.items() if not target.accepted or target.done is not None}
        course.going = [name for name in members if name not in out]
        if course.going:
            history.last = history.last if history.epoch == course.version.epoch else -1
            history.epoch = course.version.epoch  # until some instance has taken it, the next try may take a higher one
        for name in out:
            self._leave_out(name)

    async def _offer_to(self, target: Target, offer: wire.Offer, limit: asyncio.Semaphore) -> None:
        context, course = self._context, self._course
        try:
            async with limit:
                target.peer = await reach(context.engine, target.entry.address, course.left(), retry=False)
            if target.peer.incarnation != target.entry.incarnation:
                raise TransferError("another engine is at its address")
            self._watch.add(target.peer, self._lost)
            context.tell(target.peer, offer)
        except TransferError as error:
            course.done(target, self._unheard(target, error.message))

    def _unheard(self, target: Target, why: str = UNHEARD) -> str:
        """Why nothing was heard of it: another publisher rank may still have known it, when this one had lost
        it."""
        life, known = self._subscribers.gone.get((target.entry.instance, target.entry.rank), (0, ""))
        return known if life == target.entry.life and known else why

    def _incarnation(self, sender: int) -> int:
        peer = self.enters[sender][0]
        return self._context.engine.incarnation if peer is None else peer.incarnation

    def _lost(self, peer: Peer, error: TransferError) -> None:
        course = self._course
        for target in course.targets.values():
            if target.peer is peer:
                course.done(target, f"it was lost: {error.message}")

    def _leave_out(self, name: str) -> None:
        """An instance keeps the version that it has: each rank for a reason of its own, or because of
        another."""
        course = self._course
        ranks = [target for (instance, _), target in course.targets.items() if instance == name]
        blame = next((target for target in ranks if target.done), None) or next(t for t in ranks if not t.accepted)
        why = f"left out with rank {blame.entry.rank}: {blame.done or self._unheard(blame)}"
        for target in ranks:
            course.missing[target.name] = target.done or (why if target.accepted else self._unheard(target))
            course.drop(target, why)

    def heard(self) -> None:
        """Look again, because a subscriber has announced itself."""
        self._course.wake()

    def gone(self, who: wire.Entry | wire.Leave, why: str) -> None:
        """A subscriber was closed, or lost."""
        course = self._course
        target = course.targets.get((who.instance, who.rank))
        if target is not None and target.entry.life == who.life:
            course.done(target, why)

    def answer(self, peer: Peer, message: wire.Accept | wire.Decline | wire.Done) -> None:
        """Handle an answer of a subscriber rank."""
        course = self._course
        target = course.targets.get((message.instance, message.rank))
        if target is None or target.peer is not peer:
            return
        if isinstance(message, wire.Accept):
            target.accepted = True
            course.wake()
        elif isinstance(message, wire.Decline) and message.kind == "version":
            text = f"subscriber {target.name} refuses version {course.version}: {message.text}"
            course.give("version", text, Version(message.epoch, message.number))
        else:
            course.done(target, message.text)

    # ---- the publishers ----

    def from_rank(self, message: wire.Planned | wire.Sent | relays.Stood | wire.Abandon) -> None:
        """A publisher rank has come so far, or gives up."""
        course = self._course
        if isinstance(message, wire.Planned):
            self._planned[message.rank] = message.plan
        elif isinstance(message, relays.Stood):
            self.settling.stood.add(message.rank)
        elif isinstance(message, wire.Sent):
            self._sent.add(message.rank)
            for instance, rank, text in message.failed:
                if (target := course.targets.get((instance, rank))) is not None:
                    course.cannot_write(target, f"publisher rank {message.rank} could not write there: {text}")
        else:
            course.give(message.kind, message.text, Version(message.epoch, message.number), tuple(message.problems))
        course.wake()

    def give(self, kind: str, text: str) -> None:
        """Give the version up, for the reason that is named first."""
        self._course.give(kind, text)

    def close(self, why: str) -> None:
        """This rank ends: so does the update, whatever has come of it."""
        self._course.give("failed", why, ends=True)

    async def _give_up_late(self, given: Given) -> None:
        """This rank is closed while instances change: it says which have the version, as far as it has
        heard."""
        course = self._course
        for target in course.taking():
            course.drop(target, given.text, "begun")
            target.unwritten = target.unwritten or given.text
        await course.await_ends(min(REASON_SECONDS, course.left()))
        self._finish()

    def _abandon(self, given: Given) -> None:
        course = self._course
        for peer, enter in self.enters.values():
            course.send(peer, course.word(given, enter.attempt))
        for target in course.targets.values():
            course.drop(target, given.text, "begun" if self._has_begun else "failed")

    def _finish(self) -> None:
        context, course, history = self._context, self._course, self._history
        committed = []
        course.missing |= {target.name: target.done for target in course.targets.values() if target.done}
        for target in course.taking():
            if target.done == "":
                committed.append(target.name)
                self._subscribers.took(target.entry, course.version, context.life)
            else:
                why = course.missing[target.name] = target.done or target.unwritten or UNHEARD
                course.drop(target, why)
        history.last = max(history.last, course.version.number)
        missing = [(name, wire.clip(why)) for name, why in sorted(course.missing.items())]
        course.tell_ranks(wire.Outcome(self.update, committed, missing))
