"""One `publish` on one trainer rank: enter with the others, write, and leave with what came of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

from aiotransfer.aio.timeouts import Timeout, wait_shielded
from aiotransfer.engine.runtime.unpicklable import Unpicklable
from aiotransfer.errors import ClosedError, ConfigurationError, TransferError
from aiotransfer.weights.layouts.errors import PlanError
from aiotransfer.weights.memory.aside import steady
from aiotransfer.weights.protocol import relays, wire
from aiotransfer.weights.protocol.errors import UpdateError, VersionError
from aiotransfer.weights.protocol.roll import name_of
from aiotransfer.weights.protocol.version import Version
from aiotransfer.weights.publisher.run import Run
from aiotransfer.weights.publisher.sending import Sending
from aiotransfer.weights.roles.watch import Changes, Watch, reach

if TYPE_CHECKING:
    from types import TracebackType

    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.weights.publisher.borrowing import Borrowing
    from aiotransfer.weights.publisher.context import Context
    from aiotransfer.weights.publisher.leader import Leader
    from aiotransfer.weights.publisher.subscribers import Subscribers
    from aiotransfer.weights.publisher.work import Work, Works
    from aiotransfer.weights.records.observer import Journal
    from aiotransfer.weights.records.progress import Showing

T = TypeVar("T")
GRACE = 1.0  # seconds after the deadline in which rank 0 says how it ended
NEVER = -1  # no update has begun
_attempts: WeakKeyDictionary[Engine, int] = WeakKeyDictionary()  # the last one of each engine


class Files(Protocol):
    """What was saved inside of an update, under names that it has until then."""

    def commit(self) -> None:
        """Give the files their real names. Raises `OSError`."""
        ...

    def discard(self) -> None:
        """Remove them, where they have not got their real names."""
        ...


class Turn:
    """One update at a time. `current`: the one that is under way; `is_first`: no other one has begun on this
    rank before it."""

    def __init__(self, engine: Engine) -> None:
        self.current: Update | None = None
        self.is_closed = self.is_first = False
        self._engine, self._has_begun = engine, False

    def begin(self, update: Update) -> int:
        """An update begins on this rank. Returns the number of its attempt. No other one of this engine has
        it: what is said to an earlier publisher may arrive when the next one publishes. Raises `ClosedError`,
        `ConfigurationError`."""
        if self.is_closed:
            raise ClosedError("the publisher is closed")
        if self.current is not None:
            raise ConfigurationError(f"version {self.current.number} is being published", hint="one version at a time")
        self.is_first = not self._has_begun
        self.current, self._has_begun = update, True
        number = _attempts[self._engine] = _attempts.get(self._engine, 0) + 1
        return number

    def end(self, update: Update) -> None:
        """Forget an update that is over."""
        if self.current is update:
            self.current = None


@dataclass(eq=False)
class Parts:
    """What an update is made with. `leader`: what publisher rank 0 does for all, None on other ranks;
    `epoch`: that the host has named, else 0."""

    context: Context
    subscribers: Subscribers
    works: Works
    borrowing: Borrowing
    leader: Leader | None
    turn: Turn
    epoch: int


class Update(Unpicklable):
    """Made by `Publisher.publish`; `async with` it once. `number`; `version`: (epoch, number) once it has
    begun, else None."""

    _instead = "publish where its Publisher is; send update.version"

    def __init__(self, parts: Parts, number: int) -> None:
        self._parts, self._context, self._lead = parts, parts.context, parts.leader
        self.number = number
        self.version: Version | None = None
        self.update = NEVER
        self.leader: Peer | None = None  # None: this rank
        self.work: Work | None = None
        self.instances: dict[str, list[wire.Entry]] = {}
        self.journal: Journal  # from the beginning of the block on
        self._attempt = 0
        self._changes = Changes()
        self._begun: wire.Begin | None = None
        self._go: wire.Go | None = None
        self._outcome: wire.Outcome | None = None
        self._error: Exception | None = None
        self._sending: Sending | None = None
        self._early: list[Any] = []  # what rank 0 said of the writes before they began
        self._entered = self._over = False
        self._kind = ""  # why it was given up, as in `wire.Abandon`
        self._showing: Showing | None = None
        self._watch: Watch | None = None
        self._is_inside = False
        self._targets: list[Files] = []

    @property
    def is_inside(self) -> bool:
        """Whether its block runs: sources rest."""
        return self._is_inside

    def afterwards(self, target: Files) -> None:
        """Files of this version: they appear when all ranks have found their sources at rest, else not at
        all."""
        if not self._is_inside:
            target.discard()
            raise ClosedError(f"the block of version {self.version} has ended before it was saved")
        self._targets.append(target)

    @property
    def nbytes_sent(self) -> int:
        """Bytes that this rank has written so far."""
        return 0 if self._sending is None else self._sending.landed()

    # ---- the block ----

    async def __aenter__(self) -> Update:
        context = self._context
        if self._attempt:
            raise ClosedError(f"version {self.number} was published by this object before", hint="call publish again")
        self._attempt = self._parts.turn.begin(self)
        self.journal = context.observer.begin()
        self._loop = asyncio.get_running_loop()
        self._ends = self._loop.time() + context.seconds
        self._watch = Watch(context.never, context.mail)
        try:
            with self._ended():
                await self._within(self._enter)
        except GeneratorExit as error:
            self._dropped(error)
            raise
        except BaseException as error:
            await self._give_up(error)
            raise
        self._is_inside = True
        return self

    async def _enter(self) -> None:
        parts, context = self._parts, self._context
        context.sources.note()
        await context.sources.finished()
        is_first = parts.turn.is_first or (self._lead is not None and self._lead.history.epoch is None)
        await parts.subscribers.call(all_peers=is_first)  # of the first one the epoch is still to be found
        if context.rank:
            try:
                self.leader = await reach(context.engine, context.members[0], self._left())
            except TransferError as error:
                raise self._failed(
                    f"version {self.number} was not published: no way to publisher rank 0: {error.message}"
                ) from error
            self._add_watch(self.leader, "publisher rank 0")
        enter = wire.Enter(context.rank, self._attempt, self.number, parts.epoch, parts.works.digest, parts.subscribers.known())
        self._entered = True
        if self._lead is not None:
            self._lead.enter(None, enter)
        else:
            self._tell(enter)
        begun = await self._until(lambda: self._begun)
        self.version, self.update = Version(begun.epoch, begun.number), begun.update
        self.journal.step("agree")
        self._ends = min(self._ends, asyncio.get_running_loop().time() + begun.seconds)
        for entry in begun.entries:
            self.instances.setdefault(entry.instance, []).append(entry)
        try:
            self.work = await parts.works.make(self.instances)
        except PlanError as error:
            self._tell(wire.Abandon(self.update, 0, "plan", wire.clip(error.message.partition("\n")[0]), 0, -1,
                                    [wire.clip(text) for text in error.problems[: wire.MOST_PROBLEMS]]))  # fmt: skip
            if self._lead is not None:
                parts.subscribers.refuse(self.instances, error)
            raise
        parts.borrowing.begin(self.update, self.work)
        if self._lead is not None:
            for name, problems in self.work.misfits.items():  # those that do not fit, where others do
                parts.subscribers.refuse({name: self.instances[name]}, PlanError(problems=problems))
        if context.checksum:
            await context.sources.note_sums()
        self.journal.step("plan")
        self._tell(wire.Planned(self.update, context.rank, self.work.digest))
        go = await self._until(lambda: self._go)
        self.journal.step("offer")
        run = Run(
            context, parts.works, parts.borrowing, self.update, self.work, self.journal, self.tell_failed, self._changes.wake
        )
        entries = {(entry.instance, entry.rank): entry for name in go.instances for entry in self.instances[name]}
        sending = self._sending = Sending(run, entries, self._left())
        for message in self._early:
            sending.hear(message)
        self._showing = context.observer.show(self.version, sending.total, sending.landed)

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._is_inside = False
        if isinstance(value, GeneratorExit):
            self._dropped(value)
            return
        if value is not None:
            await self._give_up(value)
            return
        try:
            with self._ended():
                await self._within(self._finish)
        except GeneratorExit as error:
            self._dropped(error)
            raise
        except BaseException as error:
            await self._give_up(error)
            raise
        self._leave()
        self._raise_outcome()

    async def _finish(self) -> None:
        context, sending = self._context, self._sending
        assert sending is not None
        await self._until(lambda: sending.is_over or None)
        self.journal.step("block")
        failed = sending.result()
        context.sources.check()
        if context.checksum:
            await context.sources.check_sums()
        self.tell_failed(failed)
        if sending.standing is not None:
            self._tell(relays.Stood(self.update, context.rank))
        await self._until(lambda: self._outcome)
        for target in self._targets:
            await steady(context.engine, target.commit)
        self.journal.step("confirm")

    def tell_failed(self, failed: list[tuple[str, int, str]]) -> None:
        """This rank has written what it can; it could not write to these."""
        self._tell(wire.Sent(self.update, self._context.rank, failed))

    def _raise_outcome(self) -> None:
        assert self._outcome is not None
        missing = dict(self._outcome.missing)
        if missing:
            committed = tuple(self._outcome.committed)
            ranks = len(committed) + len(missing)
            listed = "; ".join(f"{name}: {why}" for name, why in list(missing.items())[:8])
            raise UpdateError(
                f"{len(committed)} of {ranks} ranks have version {self.version}; missing: {listed}", version=self.version,
                committed=committed, missing=missing, hint="the others keep the version before, or have none; publish the next",
            )  # fmt: skip

    # ---- waits ----

    def _left(self) -> float:
        return max(self._ends - asyncio.get_running_loop().time(), 0.0)

    async def _within(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            async with Timeout(self._left() + GRACE):
                await work()
        except TimeoutError as error:
            if isinstance(error, TransferError):
                raise
            raise self._late() from None

    def _late(self) -> UpdateError:
        self._kind = self._kind or "late"
        what = "publisher rank 0 did not say how it ended"
        if self._begun is None:
            missing = self._lead.missing() if self._lead is not None else []
            what = (
                f"publisher ranks {missing} did not enter publish({self.number})"
                if missing
                else "publisher rank 0 did not begin it"
            )
        return self._failed(f"version {self.number} was not published within {self._context.seconds:g} s: {what}")

    @contextlib.contextmanager
    def _ended(self) -> Iterator[None]:
        """What this rank finds (sources that did not rest, numbers that cannot be quantised) ends the version
        as an `UpdateError`."""
        try:
            yield
        except (PlanError, VersionError, UpdateError, ClosedError, ConfigurationError):
            raise
        except TransferError as error:
            raise self._abandoned(error.message, error.hint) from error

    def _abandoned(self, why: str, hint: str | None = None) -> UpdateError:
        """The version was given up. Before rank 0 has said how it ended, no subscriber rank has it."""
        ranks = sum(map(len, self.instances.values()))
        none = f"; 0 of {ranks} ranks have version {self.version}" if ranks and self._outcome is None else ""
        return self._failed(f"version {self.version or self.number} was abandoned: {why}{none}", hint)

    def _failed(self, text: str, hint: str | None = None) -> UpdateError:
        missing = {name_of(entry.instance, entry.rank): text for entries in self.instances.values() for entry in entries}
        return UpdateError(text, version=self.version or (0, self.number), missing=missing, hint=hint)

    async def _until(self, value: Callable[[], T | None]) -> T:
        def check() -> bool:
            if self._error is not None and self._outcome is None:  # rank 0 may leave as soon as it has said how all ended
                raise self._error
            return value() is not None

        await self._changes.until(check)
        found = value()
        assert found is not None
        return found

    # ---- what is heard ----

    def hear(self, message: Any) -> None:
        """Handle a message of rank 0."""
        match message:
            case wire.Begin(attempt=self._attempt):
                self._begun, self.update = message, message.update  # at once: a rank that is cancelled now gives this update up
            case wire.Go(update=self.update):
                self._go = message
            case wire.Drop() | relays.Instead() | relays.Settle() if message.update == self.update:
                if self._sending is None:
                    self._early.append(message)
                else:
                    self._sending.hear(message)
            case wire.Outcome(update=self.update):
                self._outcome = message
            case wire.Abandon() if message.update == self.update or (self.update == NEVER and message.attempt == self._attempt):
                self._error = self._error or self._told(message)
        self._changes.wake()

    def _told(self, message: wire.Abandon) -> Exception:
        self._kind = message.kind
        current = Version(message.epoch, message.number) if message.number >= 0 else None
        match message.kind:
            case "version":
                hint = "take a higher number; after a restart a new Publisher takes the next epoch"
                return VersionError(
                    message.text, version=self.version or (message.claim, self.number), current=current, hint=hint
                )
            case "plan":
                return PlanError(message.text, problems=message.problems)
            case _:
                return self._abandoned(message.text)

    def granted(self, peer: Peer, message: wire.Grant) -> None:
        """A subscriber rank lets this one write."""
        if self._sending is not None:
            self._sending.granted(peer, message)

    def forward(self, entry: wire.Entry) -> None:
        """A subscriber was heard of: rank 0 may wait for it."""
        if self._context.rank and self._entered and self._begun is None:
            self._tell(wire.Heard(self._context.rank, entry))

    def _add_watch(self, peer: Peer, who: str) -> None:
        assert self._watch is not None

        def lost(peer: Peer, error: TransferError) -> None:
            self._kind = self._kind or "lost"
            self._error = self._error or self._failed(f"version {self.number} was abandoned: {who} was lost: {error.message}")
            self._changes.wake()

        self._watch.add(peer, lost)

    def _tell(self, message: Any) -> None:
        if self._lead is None:
            if self.leader is not None and self.leader.state in ("up", "busy"):
                self._context.tell(self.leader, message)
        elif self._lead.conduct is not None and self._lead.conduct.update == self.update:
            self._lead.conduct.from_rank(message)

    # ---- the end ----

    def _abandon(self, why: str) -> None:
        if self._over or not self._entered or self._error is not None:
            return
        if self._begun is not None:
            text = wire.clip(f"publisher rank {self._context.rank}: {why}")
            self._tell(wire.Abandon(self.update, 0, "failed", text, 0, -1, []))
        elif self._lead is not None:
            self._lead.withdraw(0, self._attempt)
        else:
            self._tell(wire.Withdraw(self._context.rank, self._attempt))

    def _dropped(self, error: GeneratorExit) -> None:
        """Its coroutine was: nothing may be awaited. Where its loop was closed, too, everything else of it is
        over."""
        if not self._loop.is_closed():
            self._abandon("its coroutine was dropped")
            self._leave(error)
            return
        for target in self._targets:
            target.discard()

    def _leave(self, error: BaseException | None = None) -> None:
        """Nothing is written any more, or nothing may be awaited. `error`: what ended it."""
        if self._over:
            return
        self._over = True
        for target in self._targets:
            target.discard()
        if self._showing is not None:
            self._showing.close()
        if self._watch is not None:
            self._watch.close()
        if self._sending is not None:
            self._sending.cancel()
        self._parts.turn.end(self)
        self._context.watch.close()
        self._parts.borrowing.end()
        self._record(error)

    def _record(self, error: BaseException | None) -> None:
        """What is known of it in the end."""
        outcome, staging = self._outcome, self._parts.works.staging_held
        missing = dict(outcome.missing) if outcome is not None and error is None else {}
        committed = bool(outcome is not None and outcome.committed and error is None)
        if error is not None:
            how = _outcome_of(error, self._kind)
        else:
            how = "committed" if not missing else "partial" if committed else "failed"
        text = "; ".join(f"{name}: {why}" for name, why in missing.items())
        known: dict[str, Any] = {} if self._begun is None else {"update": f"{self.update:016x}", "version": self.version}
        self.journal.close(
            outcome=how, error=text if error is None else str(getattr(error, "message", None) or repr(error)),
            total=0 if self._sending is None else self._sending.total, nbytes=self.nbytes_sent, staging=staging,
            subscribers=sum(map(len, self.instances.values())), present=self.version if committed else None,
            left_behind=tuple(sorted({name.rpartition("/")[0] for name in missing})) if committed else (), **known,
        )  # fmt: skip

    async def _give_up(self, error: BaseException) -> None:
        """Returns when nothing is written any more."""
        if self._over:
            return
        self._abandon(f"{type(error).__name__}: {str(getattr(error, 'message', error))[:500]}")
        try:
            if self._sending is not None:
                self._sending.cancel()
                await wait_shielded(self._sending.task)
        finally:
            self._leave(error)

    def fail(self, error: Exception) -> None:
        """Note the error by which the update cannot go on on this rank."""
        self._error = self._error or error
        self._changes.wake()

    async def close(self) -> None:
        """Give the version up, because the publisher is closed."""
        self.fail(ClosedError("the publisher was closed"))
        self._abandon("it was closed")
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.wait([self._sending.task])


def _outcome_of(error: BaseException, kind: str) -> str:
    """Of an update that raised; `kind`: what was known of the reason before."""
    match error:
        case VersionError():
            return "version"
        case PlanError():
            return "plan"
        case ClosedError():
            return "closed"
        case asyncio.CancelledError() | GeneratorExit():
            return "cancelled"
        case _:
            return kind or "failed"
