"""The paths to each peer: which is taken, which memory needs another one, and what happens when one breaks.

The best provider that both sides have and that works is the peer's default path. Memory that it cannot reach
(foreign memory where this process may not write into the other, say) is bound by the next one. A path that
breaks is opened again. Where that does not work and there is another way, it is given up: both sides fence
it, tell each other what they have counted, and all that was not finished begins again on the other path, its
counts exact. Operations notice nothing of this: they name a binding.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from aiotransfer.advice import advise
from aiotransfer.aio.timeouts import Timeout
from aiotransfer.core.ranking import AUTOMATIC, Ranking, apart, rank
from aiotransfer.engine.runtime.affinity import cpus_for
from aiotransfer.engine.runtime.runtime import is_open
from aiotransfer.errors import (
    BrokenError,
    ClosedError,
    ProviderUnavailableError,
    RegistrationError,
    TransferError,
    TransferTimeout,
    again,
)
from aiotransfer.model.offer import ProviderOffer
from aiotransfer.providers import native
from aiotransfer.providers.port import Binding
from aiotransfer.quote import quote

if TYPE_CHECKING:
    from aiotransfer.aio.tasks import Tasks
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.engine.runtime.runtime import Runtime
    from aiotransfer.model.descriptor import RemoteRegion
    from aiotransfer.providers.port import Path, Provider

BIND_SECONDS = 0.01  # between two attempts to learn where a peer's memory is
MEND_SECONDS = 0.01  # between two attempts to open a broken path again, at first
GIVE_UP_SHARE = 0.25  # of peer_timeout: for a path to heal before another one is taken


class Paths:
    """Of all peers of one engine. `preference`: "auto", or the names of providers that the user chose."""

    def __init__(
        self, engine: Runtime, providers: Mapping[str, Provider], preference: str | tuple[str, ...], tasks: Tasks
    ) -> None:
        self._engine = engine
        self._providers = providers
        self._preference = preference
        self._tasks = tasks
        self.by_lane_peer: dict[int, Peer] = {}
        engine._lane.cpus_for = cpus_for(engine.config, engine._platform)
        self._mending: dict[Path, asyncio.Event] = {}  # set: there is reason to try again at once
        self._dialing: dict[tuple[Peer, str], asyncio.Future[Path]] = {}
        self._companions: list[Path] = []  # the other halves of a connection to ourselves
        self._warned: set[tuple[str, str]] = set()

    # ---- finding ----

    def offers(self) -> list[ProviderOffer]:
        """What peers are told of each provider."""
        return [provider.offer() for provider in self._providers.values()]

    def _ranking(self, peer: Peer, require: str | None = None) -> Ranking:
        return rank(self.offers(), peer._link.info.offers, self._preference, require)

    async def set_up(self, peer: Peer, require: str | None) -> None:
        """The default path. Raises `ProviderUnavailableError` with every reason."""
        ranking = self._ranking(peer, require)
        reasons = list(ranking.reasons)
        for name in ranking.paths:
            try:
                path = await self._dial(peer, name)
            except (BrokenError, RegistrationError) as error:
                if peer.error is not None:  # it has gone: no other way would lead to it, and that is the reason
                    raise
                reasons.append((name, str(error).partition("\n")[0]))
                continue
            path.reasons = tuple(reasons)
            peer._take_as_default(path)
            self._warn(peer, path)
            return
        raise ProviderUnavailableError(
            f"no common way to {peer.address}" + (f" by {quote(require)}" if require else ""),
            attempts=reasons,
            peer=str(peer.address),
            hint="; ".join(f"{name}: {why}" for name, why in reasons) or "the two sides share no provider",
        )

    async def _dial(self, peer: Peer, name: str) -> Path:
        if not is_open(self._engine):  # closed while another way was tried
            raise ClosedError("the engine was closed while the connection was being set up")
        theirs = next(o for o in peer._link.info.offers if o.provider == name)
        path = await self._providers[name].dial(peer, theirs)
        self._attach(peer, path, dialled=True)
        return path

    def _attach(self, peer: Peer, path: Path, *, dialled: bool = False) -> None:
        peer._add_path(path)
        path.on_retired = lambda: self._retired(peer, path)
        for one in (path, *path.members):
            self.by_lane_peer[one.lane_peer] = peer
        if path.members != (path,):
            for one in path.members:  # what was not up with the first joins when it is
                if one.broken and dialled:
                    self.broke(peer, one.lane_peer)

    def detach(self, path: Path) -> None:
        """Close a path: events of it are not handed on any more."""
        for one in (path, *path.members):
            self.by_lane_peer.pop(one.lane_peer, None)
        path.close()

    def take(self, peer: Peer, path: Path) -> None:
        """The other side has set one up."""
        if peer.incarnation == self._engine.incarnation:
            self._companions.append(path)
            return
        if peer._state == "connecting":  # what it offered before did not work from there
            peer._start_anew(path)
            path.reasons = self._passed_over(peer, path.provider)
        self._attach(peer, path)

    def _passed_over(self, peer: Peer, taken: str) -> tuple[tuple[str, str], ...]:
        ranking = self._ranking(peer)
        better = ranking.paths[: ranking.paths.index(taken)] if taken in ranking.paths else ()
        return (*ranking.reasons, *((name, "the other side, which dialed, did not take it") for name in better))

    async def _another(self, peer: Peer, but: set[str]) -> Path | None:
        """The best path by none of these providers, set up if need be."""
        for name in self._ranking(peer).paths:
            if name in but:
                continue
            known = next((path for path in peer._paths if path.provider == name and not path.dead), None)
            if known is not None:
                return known
            key = peer, name
            future = self._dialing.get(key)
            if future is None:
                future = self._dialing[key] = asyncio.ensure_future(self._dial(peer, name))
                future.add_done_callback(lambda done, key=key: (self._dialing.pop(key), done.cancelled() or done.exception()))  # type: ignore[misc]
            try:
                return await asyncio.shield(future)
            except (BrokenError, RegistrationError):
                continue
        return None

    def _warn(self, peer: Peer, path: Path) -> None:
        """A better provider that both sides have was passed over because it did not work: not silently."""
        better = AUTOMATIC[: AUTOMATIC.index(path.provider)]
        failed = [(name, why) for name, why in path.reasons if name in better and self._in_use(peer, name)]
        key = str(peer.address), path.provider
        if not failed or key in self._warned or self._preference != "auto":
            return
        self._warned.add(key)
        why = "; ".join(f"{name}: {reason}" for name, reason in failed)
        advise(
            f"{peer.name or peer.address} is reached by {path.provider}, a slower way than others that both sides have ({why}); "
            f"require={failed[0][0]!r} makes this an error",
            RuntimeWarning,
        )

    def _warn_of_memory(self, peer: Peer, path: Path, why: RegistrationError) -> None:
        """Memory of a peer that its default path does not reach goes by a slower one: not silently, and once
        for each peer."""
        key = str(peer.address), f"memory by {path.provider}"
        if key in self._warned or self._preference != "auto" or path.provider not in AUTOMATIC:
            return
        if AUTOMATIC.index(path.provider) < AUTOMATIC.index(peer.path.provider):
            return
        self._warned.add(key)
        advise(
            f"registered memory of {peer.name or peer.address} is reached by {path.provider}, a slower way than "
            f"{peer.path.provider} ({str(why).partition(chr(10))[0]}); memory of engine.allocate() goes by {peer.path.provider}, "
            f"require={peer.path.provider!r} makes this an error",
            RuntimeWarning,
        )

    def _in_use(self, peer: Peer, name: str) -> bool:
        if name not in self._providers:
            return False
        theirs = next((o for o in peer._link.info.offers if o.provider == name), None)
        ours = self._providers[name].offer()
        return theirs is not None and not apart(name, ours.host, theirs.host)

    # ---- memory ----

    async def bind_within(self, region: RemoteRegion, peer: Peer, seconds: float) -> None:
        """Have the owner's answer where its memory is. Raises `TransferTimeout` after so many seconds."""
        try:
            async with Timeout(seconds):
                while not await self._bind_once(region, peer):
                    await asyncio.sleep(BIND_SECONDS)
        except TimeoutError as error:
            if isinstance(error, TransferError):
                raise
            raise TransferTimeout(
                f"{peer} did not say in time where its region is", peer=str(peer.address), hint="is its event loop blocked?"
            ) from error

    async def _bind_once(self, region: RemoteRegion, peer: Peer) -> bool:
        """False when one attempt took too long, which says nothing of the next: the deadline is the
        operation's own."""
        try:
            await self.bind(region, peer)
        except TransferTimeout:
            return False
        return True

    async def bind(self, region: RemoteRegion, peer: Peer) -> None:
        """Make the region's box hold a binding that is good for `peer`. Raises what the owner or the last
        path says."""
        box = region._box
        if box.bound is not None and box.bound.good(self._engine, peer):
            return
        path, tried, first = peer.path, set[str](), None
        while True:
            try:
                fresh = await path.bind(region._grant, peer, peer)
                break
            except RegistrationError as error:
                first = first or error
                tried.add(path.provider)
                following = await self._another(peer, tried)
                if following is None:
                    raise first from None
                path = following
            except BrokenError as error:
                if peer._error is not None:  # it went while its memory was fetched: that is the news
                    raise again(peer._error) from error
                if not path.dead:
                    raise
                path = peer.path
        fresh.engine, fresh.grant = self._engine, region._grant
        box.bound = fresh
        if first is not None:
            self._warn_of_memory(peer, path, first)

    # ---- a path that breaks ----

    def broke(self, peer: Peer, number: int, error: int = -1) -> None:
        """The connection of one of its paths went, not the peer: open it again. What was posted waits, within
        its deadlines. Without an error (0): its port is back."""
        found = ((whole, one) for whole in peer._paths for one in whole.members if one.lane_peer == number)
        whole, path = next(found, (None, None))
        if path is not None and path in self._mending and not error:
            self._mending[path].set()
        if whole is None or path is None or path in self._mending or not self._is_to_be_mended(peer, whole, path):
            return
        self._mending[path] = asyncio.Event()
        self._start(peer, self._mend(peer, whole, path))

    def _is_to_be_mended(self, peer: Peer, whole: Path, path: Path) -> bool:
        """One of several may break, or be late, before the peer is up; what fails alone then is its dialer's
        to judge."""
        return not whole.dead and (peer._state == "up" or (peer._state == "connecting" and whole is not path))

    def _start(self, peer: Peer, work: object) -> None:
        task = self._engine._loop.create_task(work)  # type: ignore[arg-type,var-annotated]
        self._tasks.own(task)

    async def _mend(self, peer: Peer, whole: Path, path: Path) -> None:
        loop, pause = self._engine._loop, MEND_SECONDS
        give_up_at = loop.time() + GIVE_UP_SHARE * self._engine.config.peer_timeout
        try:
            while self._is_to_be_mended(peer, whole, path) and path.broken:
                try:
                    async with asyncio.timeout_at(max(give_up_at, loop.time() + pause)):
                        await path.reopen(peer)
                except (TransferError, TimeoutError):
                    await self._pause(path, pause)  # the peer itself is lost when it is silent for long enough
                    pause = min(2 * pause, 32 * MEND_SECONDS)
                late = path.broken and whole.broken and loop.time() >= give_up_at
                if late and not await self._give_up(peer, whole):
                    give_up_at = loop.time() + GIVE_UP_SHARE * self._engine.config.peer_timeout
        finally:
            del self._mending[path]  # in the same turn as the last look: what breaks from here on begins anew

    async def _pause(self, path: Path, seconds: float) -> None:
        """Wait before the next attempt, less if there is news of this path."""
        news = self._mending[path]
        news.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await news.wait()

    def suspect(self, peer: Peer) -> None:
        """Find out about a peer that has been silent on its default path: whether it answers otherwise, and
        has another path."""
        path = peer._path
        if path is None or path in self._mending or len(self._ranking(peer).paths) < 2:
            return
        self._mending[path] = asyncio.Event()
        self._start(peer, self._find_out(peer, path))

    def look(self, peer: Peer, now: float, blocked: bool) -> None:
        """Break rails of which nothing comes any more while something comes by others: nothing else would
        report them."""
        for path in peer._paths:
            for one in path.silent(now, self._engine.config.peer_timeout / 2, blocked):
                one.strike()

    async def _find_out(self, peer: Peer, path: Path) -> None:
        try:
            await peer.ping(timeout=self._engine.config.peer_timeout / 2)
            await self._give_up(peer, path)
        except TransferError:
            pass  # it answers nowhere: it will be lost
        finally:
            del self._mending[path]

    async def _give_up(self, peer: Peer, path: Path) -> bool:
        """Go over to another path, if there is one and both sides can tell what was counted on this one."""
        following = await self._another(peer, {path.provider})
        if following is None or path.dead or peer._state != "up":
            return False
        try:
            await path.retire(peer)
        except TransferError:
            return False
        await self._move(peer, path, following)
        return True

    def _retired(self, peer: Peer, path: Path) -> None:
        """The other side has given it up, after it had another one set up."""
        self._start(peer, self._follow(peer, path))

    async def _follow(self, peer: Peer, path: Path) -> None:
        following = await self._another(peer, {path.provider})
        if following is not None and peer._state == "up":
            await self._move(peer, path, following)
        else:
            peer._lose(f"the path by {path.provider} was given up, and there is no other")

    async def _move(self, peer: Peer, old: Path, new: Path) -> None:
        if old.dead:
            return  # both sides had enough of it
        engine, lib = self._engine, native.lib
        old.dead = True
        if peer._path is old:
            new.reasons = (*new.reasons, (old.provider, "it broke, and did not heal"))
            peer._take_as_default(new)
        pairs: list[tuple[Binding, Binding]] = []
        for binding in list(old.bindings):
            if lib.at_remote_uses(engine._p, binding.remote) > 0:
                try:
                    fresh = await new.bind(binding.grant, peer, peer)
                except TransferError:
                    continue  # taken back meanwhile: its operations end
                fresh.engine, fresh.grant = engine, binding.grant
                binding.outlive(fresh)  # an operation that keeps the old one keeps the memory that it moves to
                pairs.append((binding, fresh))
        if engine._lane.usable:
            olds, news = [b.remote for b, _ in pairs], [b.remote for _, b in pairs]
            lib.at_reroute(engine._p, old.lane_peer, new.lane_peer, len(pairs), olds, news)
            self.detach(old)
            engine._progress.poll()
        peer._drop_path(old)
        self._warn(peer, new)

    # ---- the end ----

    def gone(self, peer: Peer) -> None:
        """Let go of what belongs to a peer that has ended."""
        if peer.incarnation == self._engine.incarnation:
            for path in self._companions:
                path.close()
            self._companions.clear()
