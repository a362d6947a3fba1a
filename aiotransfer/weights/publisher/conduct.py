"""One update as publisher rank 0 conducts it: its members, the offer to the subscribers, and how it ended."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from aiotransfer.aio.timeouts import Patience
from aiotransfer.errors import TransferError
from aiotransfer.weights.aside import aside
from aiotransfer.weights.protocol import relays, wire
from aiotransfer.weights.protocol.roll import gaps, name_of, stands_in_the_way
from aiotransfer.weights.protocol.version import Version
from aiotransfer.weights.publisher.settling import Settling
from aiotransfer.weights.watch import Changes, Ending, Watch, reach

if TYPE_CHECKING:
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.weights.publisher.leader import Leader

LOOK_SECONDS = 0.05  # between two looks for peers that may be subscribers, while there is none
PARTIAL_SECONDS = 0.5  # in which the other ranks of an instance announce themselves, of which some rank has
ACCEPT_SHARE = 1 / 3  # of the time that is left, in which a subscriber must say whether it takes the version
DONE_SHARE = 0.9  # of the time that is left: what subscribers are given, so that their answers come in time
CONNECTS = 32  # at a time
REASON_SECONDS = 0.5  # of the time that is left, in which ranks of an instance that was left out say for themselves why
UNHEARD = "it did not answer in time"
NONE = Version(0, -1)


class Given(Exception):
    """The version is given up. `kind` as in `wire.Abandon`; `current`: the version that stands in the way."""

    def __init__(self, kind: str, text: str, current: Version = NONE, problems: tuple[str, ...] = ()) -> None:
        super().__init__(text)
        self.kind, self.text, self.current, self.problems = kind, text, current, problems


class Target:
    """A subscriber rank in one update. `done`: how it ended there, "" when it has the version. `unwritten`: why a publisher rank
    could not write there, which counts where the rank itself says nothing."""

    def __init__(self, entry: wire.Entry) -> None:
        self.entry = entry
        self.name = name_of(entry.instance, entry.rank)
        self.peer: Peer | None = None
        self.accepted = False
        self.done: str | None = None
        self.unwritten = ""


class Conduct:
    """Runs as a task of its own until every publisher rank has been told the outcome."""

    def __init__(self, leader: Leader, enters: dict[int, tuple[Peer | None, wire.Enter]]) -> None:
        self.leader, self.role = leader, leader.role
        self.enters = enters
        self.update = self.role.random()
        self.ends = asyncio.get_running_loop().time() + self.role.seconds
        self.targets: dict[tuple[str, int], Target] = {}
        self.missing: dict[str, str] = {}  # by the name of a subscriber rank
        self.planned: dict[int, bytes] = {}
        self.sent: set[int] = set()
        self.version = NONE
        self._going: list[str] = []
        self._has_begun = False  # the publishers' blocks
        self.settling = Settling(self)
        self._given: Given | None = None
        self._changes = Changes()
        self._watch = Watch(self.role.never, self.role.mail)
        self.task = self.role.mail.own(self._run())

    def left(self) -> float:
        """Seconds until the deadline."""
        return max(self.ends - asyncio.get_running_loop().time(), 0.0)

    async def _until(self, holds: Callable[[], bool], seconds: float | None = None) -> bool:
        """Whether it came to hold in time. Raises `Given`."""

        def check() -> bool:
            if self._given is not None:
                raise self._given
            return holds()

        try:
            async with Patience(self.left() if seconds is None else seconds):
                await self._changes.until(check)
        except TimeoutError:
            return check()
        return True

    # ---- from beginning to end ----

    async def _run(self) -> None:
        async with Ending(self._end):
            try:
                await self._publish()
            except Given as given:
                self._abandon(given)
            except Exception as error:  # nothing may leave the others waiting
                self._abandon(Given("failed", f"publisher rank 0: {type(error).__name__}: {error}"))

    def _end(self) -> None:
        self._watch.close()
        self.leader.conduct = None
        self.leader.begin()
        self.role.catching.look()

    async def _publish(self) -> None:
        role = self.role
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
        self.targets = {(entry.instance, entry.rank): Target(entry) for entry in entries}
        version = self.version
        for peer, enter in self.enters.values():
            begin = wire.Begin(enter.attempt, self.update, version.epoch, version.number, self.left(), entries)
            self.leader.send(peer, begin)
        if not await self._until(lambda: len(self.planned) == role.ranks):
            raise Given("late", f"publisher ranks {self._without(self.planned)} did not plan in time")
        if len(set(self.planned.values())) > 1:
            raise Given("plan", "publisher ranks made different plans: do all have the same layout and rules?")
        await self._offer()
        self._has_begun = True
        for peer, _ in self.enters.values():
            self.leader.send(peer, wire.Go(self.update, self._going))
        if role.work_of(self.update).relays:
            is_written, ranks = await self.settling.run(), self.settling.stood
        else:
            is_written, ranks = await self._until(lambda: len(self.sent) == role.ranks), self.sent
        if not is_written:
            raise Given("late", f"publisher ranks {self._without(ranks)} had not written everything in time")
        for name in self._going:
            chair = self.targets[name, 0]
            if chair.peer is not None:
                role.tell(chair.peer, wire.Allow(self.update, name))
        await self._until(lambda: all(target.done is not None for target in self._taking()))
        left_out = [target for key, target in self.targets.items() if target.accepted and key[0] not in self._going]
        await self._until(lambda: all(target.done is not None for target in left_out), min(REASON_SECONDS, self.left()))
        self._finish()

    def _rank_lost(self, rank: int, peer: Peer, error: TransferError) -> None:
        self.give("lost", f"publisher rank {rank} was lost: {error.message}")

    def _without(self, ranks: object) -> list[int]:
        return [rank for rank in self.enters if rank not in ranks]  # type: ignore[operator]

    def _taking(self) -> list[Target]:
        return [target for (name, _), target in self.targets.items() if name in self._going]

    async def _instances(self) -> dict[str, list[wire.Entry]]:
        """Waits for one whole instance. Others that are not whole are waited for briefly, once: what is known then takes part."""
        role, leader = self.role, self.leader
        until = asyncio.get_running_loop().time() + min(PARTIAL_SECONDS, self.left() / 4)
        while True:
            whole = role.roll.whole()
            partial = {name: [entry.life for entry in some] for name, some in role.roll.instances().items() if name not in whole}
            is_new = any(leader.partial.get(name) != lives for name, lives in partial.items())
            if whole and (not is_new or asyncio.get_running_loop().time() >= until):
                break
            if not self.left():
                known = ", ".join(f"{name}: {gaps(entries)}" for name, entries in role.roll.instances().items())
                raise Given("late", f"no whole subscriber instance was heard of{': ' + known if known else ''}")
            role.call_new()
            before = role.roll.entries
            await self._until(functools.partial(self._differs, before), min(LOOK_SECONDS, self.left()))
        leader.partial = partial
        for name in partial:
            entries = role.roll.instances()[name]
            gone = {rank: why for (instance, rank), (_, why) in role.gone.items() if instance == name}
            why = "; ".join(f"rank {rank}: {text}" for rank, text in gone.items()) or gaps(entries)
            self.missing |= {name_of(name, entry.rank): f"its instance is not whole: {why}" for entry in entries}
            self.missing |= {name_of(name, rank): text for rank, text in gone.items()}
        return whole

    def _differs(self, before: list[wire.Entry]) -> bool:
        return self.role.roll.entries != before

    def _number(self, enter: wire.Enter, entries: list[wire.Entry]) -> None:
        leader, role = self.leader, self.role
        epoch = leader.epoch or enter.epoch or role.roll.epoch()
        if not enter.epoch and any(entry.epoch == epoch and entry.trainer not in (0, role.life) for entry in entries):
            epoch = role.roll.epoch()  # trainers that are gone had offered it to a subscriber that was not there then
        self.version = version = Version(epoch, enter.number)
        if epoch == leader.epoch and enter.number <= leader.last:
            raise Given(
                "version", f"version {version} is not higher than {Version(epoch, leader.last)}", Version(epoch, leader.last)
            )
        if (stands := stands_in_the_way(entries, version, role.life)) is not None:
            who, has = name_of(stands.instance, stands.rank), Version(stands.epoch, stands.number)
            why = "" if has >= version else f" of other trainers, and epoch {version.epoch} is theirs"
            raise Given("version", f"version {version} cannot be published: subscriber {who} knows {has}{why}", has)

    # ---- the subscribers ----

    async def _offer(self) -> None:
        """Ask every rank of every instance that fits; returns when enough is known of each."""
        work = self.role.work_of(self.update)
        for (name, _), target in self.targets.items():
            if name in work.misfits:
                self.missing[target.name] = f"its layout does not fit: {work.misfits[name][0]}"
        self.targets = {key: target for key, target in self.targets.items() if key[0] not in work.misfits}
        limit = asyncio.Semaphore(CONNECTS)
        members: dict[str, list[str]] = {}
        for (name, _), target in self.targets.items():
            members.setdefault(name, []).append(target.entry.address)
        seconds = self.left() * DONE_SHARE
        if work.relays:
            await aside(self.role.engine, work.offered)
        tasks = []
        for (name, rank), target in self.targets.items():
            passing = self.settling.passing(work, name, rank)
            counts = work.expected(name, rank) if passing is None else self.settling.counts(work, passing)
            senders = [wire.Sender(s, self._incarnation(s), of) for s, of in sorted(counts.items())]
            offer = wire.Offer(
                self.update, target.entry.life, self.role.life, self.version.epoch, self.version.number, seconds,
                members[name], senders, work.names(name), "", "", self.role.checksum, passing,
            )  # fmt: skip
            tasks.append(self.role.mail.own(self._offer_to(target, offer, limit)))
        try:
            await self._until(
                lambda: all(target.accepted or target.done is not None for target in self.targets.values()),
                self.left() * ACCEPT_SHARE,
            )
        finally:
            for task in tasks:
                task.cancel()
        out = {name for (name, _), target in self.targets.items() if not target.accepted or target.done is not None}
        self._going = [name for name in members if name not in out]
        if self._going:
            self.leader.last = self.leader.last if self.leader.epoch == self.version.epoch else -1
            self.leader.epoch = self.version.epoch  # until some instance has taken it, the next try may take a higher one
        for name in out:
            self._leave_out(name)

    async def _offer_to(self, target: Target, offer: wire.Offer, limit: asyncio.Semaphore) -> None:
        try:
            async with limit:
                target.peer = await reach(self.role.engine, target.entry.address, self.left(), retry=False)
            if target.peer.incarnation != target.entry.incarnation:
                raise TransferError("another engine is at its address")
            self._watch.add(target.peer, self._lost)
            self.role.tell(target.peer, offer)
        except TransferError as error:
            self.done(target, self._unheard(target, error.message))

    def _unheard(self, target: Target, why: str = UNHEARD) -> str:
        """Why nothing was heard of it: another publisher rank may still have known it, when this one had lost it."""
        life, known = self.role.gone.get((target.entry.instance, target.entry.rank), (0, ""))
        return known if life == target.entry.life and known else why

    def _incarnation(self, sender: int) -> int:
        peer = self.enters[sender][0]
        return self.role.engine.incarnation if peer is None else peer.incarnation

    def _lost(self, peer: Peer, error: TransferError) -> None:
        for target in self.targets.values():
            if target.peer is peer:
                self.done(target, f"it was lost: {error.message}")

    def _leave_out(self, name: str) -> None:
        """An instance keeps the version that it has: each rank for a reason of its own, or because of another."""
        ranks = [target for (instance, _), target in self.targets.items() if instance == name]
        blame = next((target for target in ranks if target.done), None) or next(t for t in ranks if not t.accepted)
        why = f"left out with rank {blame.entry.rank}: {blame.done or self._unheard(blame)}"
        for target in ranks:
            self.missing[target.name] = target.done or (why if target.accepted else self._unheard(target))
            self._drop(target, why)

    def _drop(self, target: Target, why: str, kind: str = "failed") -> None:
        """Tell a subscriber rank that the version does not come."""
        if target.peer is not None and target.done is None and target.peer.state in ("up", "busy"):
            self.role.tell(target.peer, self._word(Given(kind, why)))

    def heard(self) -> None:
        """Look again, because a subscriber has announced itself."""
        self._changes.wake()

    def gone(self, who: wire.Entry | wire.Leave, why: str) -> None:
        """A subscriber was closed, or lost."""
        target = self.targets.get((who.instance, who.rank))
        if target is not None and target.entry.life == who.life:
            self.done(target, why)

    def answer(self, peer: Peer, message: wire.Accept | wire.Decline | wire.Done) -> None:
        """Handle an answer of a subscriber rank."""
        target = self.targets.get((message.instance, message.rank))
        if target is None or target.peer is not peer:
            return
        if isinstance(message, wire.Accept):
            target.accepted = True
            self._changes.wake()
        elif isinstance(message, wire.Decline) and message.kind == "version":
            text = f"subscriber {target.name} refuses version {self.version}: {message.text}"
            self.give("version", text, Version(message.epoch, message.number))
        else:
            self.done(target, message.text)

    def done(self, target: Target, text: str) -> None:
        """How it ended at a subscriber rank."""
        if target.done is None:
            target.done = text
            if text and not target.unwritten:
                self._tell_others(target, text)
        self._changes.wake()

    def _cannot_write(self, target: Target, text: str) -> None:
        """A publisher rank cannot write there. What the subscriber rank says of it, or that it is lost, is the better reason."""
        if target.done is None and not target.unwritten:
            target.unwritten = text
            self._tell_others(target, text)

    def _tell_others(self, target: Target, text: str) -> None:
        """Rank 0 of its instance decides for the others, and must know of a loss; of its own all are told. Publishers write
        nothing more there."""
        for (name, rank), other in self.targets.items():
            if name == target.entry.instance and 0 in (rank, target.entry.rank):
                self._drop(other, f"rank {target.entry.rank}: {text}")
        if target.entry.instance in self._going:
            word = wire.Drop(self.update, target.entry.instance, target.entry.rank, wire.clip(text))
            for peer, _ in self.enters.values():
                self.leader.send(peer, word)

    # ---- the publishers ----

    def from_rank(self, message: wire.Planned | wire.Sent | relays.Stood | wire.Abandon) -> None:
        """A publisher rank has come so far, or gives up."""
        if isinstance(message, wire.Planned):
            self.planned[message.rank] = message.plan
        elif isinstance(message, relays.Stood):
            self.settling.stood.add(message.rank)
        elif isinstance(message, wire.Sent):
            self.sent.add(message.rank)
            for instance, rank, text in message.failed:
                if (target := self.targets.get((instance, rank))) is not None:
                    self._cannot_write(target, f"publisher rank {message.rank} could not write there: {text}")
        else:
            self.give(message.kind, message.text, Version(message.epoch, message.number), tuple(message.problems))
        self._changes.wake()

    def give(self, kind: str, text: str, current: Version = NONE, problems: tuple[str, ...] = ()) -> None:
        """Give the version up, for the reason that is named first."""
        self._given = self._given or Given(kind, text, current, problems)
        self._changes.wake()

    def _word(self, given: Given, attempt: int = 0) -> wire.Abandon:
        problems = [wire.clip(problem) for problem in given.problems[: wire.MOST_PROBLEMS]]
        text, current = wire.clip(given.text), given.current
        return wire.Abandon(self.update, attempt, given.kind, text, current.epoch, current.number, problems, self.version.epoch)

    def _abandon(self, given: Given) -> None:
        for peer, enter in self.enters.values():
            self.leader.send(peer, self._word(given, enter.attempt))
        for target in self.targets.values():
            self._drop(target, given.text, "begun" if self._has_begun else "failed")

    def _finish(self) -> None:
        committed = []
        self.missing |= {target.name: target.done for target in self.targets.values() if target.done}
        for target in self._taking():
            if target.done == "":
                committed.append(target.name)
                self.role.took(target.entry, self.version, self.role.life)
            else:
                why = self.missing[target.name] = target.done or target.unwritten or UNHEARD
                self._drop(target, why)
        self.leader.last = max(self.leader.last, self.version.number)
        missing = [(name, wire.clip(why)) for name, why in sorted(self.missing.items())]
        for peer, _ in self.enters.values():
            self.leader.send(peer, wire.Outcome(self.update, committed, missing))
