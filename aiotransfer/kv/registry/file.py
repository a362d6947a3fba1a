"""A registry in a directory that all ranks see: of one host, or of several over a network file system.

An entry is a file; it is written beside its place and renamed onto it, so that no reader sees half of one,
and it holds the end of its lease (`stamp`). Entries that ended a while ago, and files that a killed writer
left half written, are removed by the next process that looks. Files belong to the user who wrote them and are
read by that user alone. Files of another user, who can put them there when the directory is /tmp, say, are
ignored.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import stat
import tempfile
import time
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from aiotransfer.aio.ratelimit import RateLimit, more
from aiotransfer.errors import DescriptorError
from aiotransfer.kv.registry import bounds
from aiotransfer.kv.registry.member import MOST_BYTES
from aiotransfer.kv.registry.stamp import Clocks, Sighting, Stamp, is_good, pack, sight, unpack
from aiotransfer.kv.registry.worker import Worker
from aiotransfer.quote import quote

_logger = logging.getLogger("aiotransfer")
_limit = RateLimit()

SUFFIX = ".member"
HALF_WRITTEN = ".writing-"
MOST_FILE_BYTES = MOST_BYTES + 4096
MOST_NAMES = 2 * bounds.MOST_ENTRIES  # of files, of any kind and owner, that one look goes through
MOST_UNREADABLE = 1024  # remembered
REMOVE_SECONDS = 10.0  # an entry that has ended stays for so long: its writer may only have been late
HALF_WRITTEN_SECONDS = 60.0


class _Found(NamedTuple):
    """A file as it was read last."""

    signature: tuple[int, int, int]
    value: bytes
    seen: Sighting


class FileBackend:
    """Entries in files of `directory`, which is made when it is not there. See `Backend`.

    It is looked at as often as the `Registry` says (`poll`). Errors of the file system are outages. Only
    files of this process's user are entries. In a directory in which other users may write, they can still
    remove entries (a warning says so): take a directory that belongs to this user, and in which no other user
    may write.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory).absolute()
        self._worker = Worker("aiotransfer-registry")
        self._found: dict[str, _Found] = {}
        self._unreadable: dict[str, tuple[int, int, int]] = {}  # what was complained about
        self._ended: dict[str, float] = {}  # files that may be removed, and since when
        self._boot = _boot()
        self._made = False
        self._uid: int | None = None  # of files that this process writes here; a network file system may have its own idea

    async def put(self, key: str, value: bytes, ttl: float) -> None:
        """See `Backend`."""
        await self._worker.call(lambda: self._write(key, value, ttl))

    async def keep_alive(self, key: str, ttl: float) -> bool:
        """See `Backend`."""

        def renew() -> bool:
            try:
                stamp, value = unpack(_read(self._path(key), self._owner()))
            except (FileNotFoundError, PermissionError, DescriptorError):
                return False
            now = self.clocks()
            if not is_good(sight(None, stamp, now), now):
                return False
            self._write(key, value, ttl)
            return True

        return await self._worker.call(renew)

    async def delete(self, key: str) -> None:
        """See `Backend`."""
        await self._worker.call(lambda: self._path(key).unlink(missing_ok=True))

    async def entries(self) -> dict[str, bytes]:
        """See `Backend`."""
        return await self._worker.call(self._list)

    async def changed(self, seconds: float) -> None:
        """See `Backend`. It sleeps: the file backend has no notification of changes."""
        await asyncio.sleep(seconds)

    async def aclose(self) -> None:
        """See `Backend`."""
        await self._worker.aclose()

    def clocks(self) -> Clocks:
        """The clocks of this host, now."""
        return Clocks(time.time(), time.clock_gettime(time.CLOCK_BOOTTIME), self._boot)

    # ---- in the thread ----

    def _path(self, key: str) -> Path:
        if not key or not all(letter.isascii() and (letter.isalnum() or letter == "-") for letter in key):
            raise ValueError(f"a key is made of letters, digits and hyphens, not {quote(key)}")
        return self.directory / f"{key}{SUFFIX}"

    def _write(self, key: str, value: bytes, ttl: float) -> None:
        path = self._path(key)
        self.directory.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=HALF_WRITTEN, dir=self.directory)
        try:
            with open(descriptor, "wb") as file:
                file.write(pack(Stamp.until(ttl, self.clocks()), value))
            os.replace(name, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise

    def _list(self) -> dict[str, bytes]:
        if not self._made:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._made = True  # a directory that goes away later is an outage, not an empty registry
            self._warn_of_others()
        now = self.clocks()
        found: dict[str, _Found] = {}
        with os.scandir(self.directory) as files:
            names = [entry.name for entry in islice(files, MOST_NAMES)]
        ended = {name for name in names if name.startswith(HALF_WRITTEN)}
        newcomers = (name for name in names if name.endswith(SUFFIX) and name not in self._found)
        room, everything = bounds.Room(), len(names) < MOST_NAMES
        for name in (*self._found, *newcomers):  # the known ones first: newcomers do not crowd them out
            if room.full:
                everything = False
                break
            if (one := self._look(name, now)) is not None:
                if room.takes(len(one.value)):
                    found[name] = one
                else:
                    everything = False
        if not everything:
            bounds.complain(str(self.directory))
        self._found = found
        good = {name: one.value for name, one in found.items() if is_good(one.seen, now)}
        self._remove(ended | (found.keys() - good.keys()), now)
        return {name.removesuffix(SUFFIX): value for name, value in good.items()}

    def _look(self, name: str, now: Clocks) -> _Found | None:
        known = self._found.get(name)
        try:
            status = os.lstat(self.directory / name)
            if not stat.S_ISREG(status.st_mode):
                return None
            signature = status.st_mtime_ns, status.st_ino, status.st_size
            ours = known is not None and known.seen.stamp.boot == self._boot
            if status.st_uid != self._owner():
                raise PermissionError(f"it belongs to uid {status.st_uid}, not {self._owner()}, and is no entry")
            if known is not None and known.signature == signature and ours:
                return known  # not of other hosts: network file systems keep for a while what `stat` says, and open anew
            if self._unreadable.get(name) == signature:
                return known
            stamp, value = unpack(_read(self.directory / name, self._owner()))
        except FileNotFoundError:  # it has just gone
            return None
        except (DescriptorError, PermissionError, ValueError, LookupError, RecursionError) as error:
            # also of a later version: the file is not ours to remove
            if len(self._unreadable) >= MOST_UNREADABLE:
                self._unreadable.clear()
            self._unreadable[name] = signature
            left_out = _limit.admit("unreadable")
            if left_out is not None:
                _logger.warning("%s cannot be read: %s%s", self.directory / name, error, more(left_out))
            return known
        except OSError as error:
            if error.errno != errno.ESTALE:  # replaced under our hands, on a network file system
                raise
            return known
        return _Found(signature, value, sight(None if known is None else known.seen, stamp, now))

    def _owner(self) -> int:
        """The user who owns files that this process writes there."""
        if self._uid is None:
            try:
                descriptor, name = tempfile.mkstemp(prefix=HALF_WRITTEN, dir=self.directory)
            except OSError:  # it may only look
                self._uid = os.getuid()
                return self._uid
            try:
                self._uid = os.fstat(descriptor).st_uid
            finally:
                os.close(descriptor)
                os.unlink(name)
        return self._uid

    def _warn_of_others(self) -> None:
        about = self.directory.stat()
        others = about.st_uid not in (0, os.getuid(), self._owner())
        if others or (about.st_mode & 0o022 and not about.st_mode & stat.S_ISVTX):
            mode, left_out = stat.S_IMODE(about.st_mode), _limit.admit("others")
            if left_out is not None:
                text = "other users may remove entries in %s (uid %d, mode %o)%s"
                _logger.warning(text, self.directory, about.st_uid, mode, more(left_out))

    def _remove(self, ended: set[str], now: Clocks) -> None:
        self._ended = {name: self._ended.get(name, now.up) for name in ended}
        for name, since in list(self._ended.items()):
            if now.up - since >= (HALF_WRITTEN_SECONDS if name.startswith(HALF_WRITTEN) else REMOVE_SECONDS):
                with suppress(OSError):
                    os.unlink(self.directory / name)
                del self._ended[name]


def _read(path: Path, uid: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        if (owner := os.fstat(descriptor).st_uid) != uid:
            raise PermissionError(f"it belongs to uid {owner}, not {uid}, and is no entry")
        data = file.read(MOST_FILE_BYTES + 1)
    if data is None or len(data) > MOST_FILE_BYTES:
        raise DescriptorError(f"no entry of a registry: more than {MOST_FILE_BYTES} bytes")
    return data


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
