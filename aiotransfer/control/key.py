"""The shared secret of a group of engines.

Given explicitly (argument or `AIOTRANSFER_KEY`), or, without one, a file that only this user can read: a
process that proves that it has read the file is of the same user on this host (or shares the directory that
holds the file). The key is never printed or logged.

A stranger who has heard a proof can check guesses of the key against it. So a key that was given is
stretched: each guess costs one scrypt (16 MiB and some 40 ms), which each process of ours pays once. A key
that `python -m aiotransfer key` has made, which cannot be guessed, is used as it is.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

from aiotransfer.errors import ConfigurationError, TransferError, shortage

KEY_BYTES = 32
LEAST_BYTES = 16
_GENERATED = re.compile(rb"atk1-[A-Za-z0-9_-]{43}")
_ADVICE = "give all engines one key=... (or AIOTRANSFER_KEY; `python -m aiotransfer key` makes one)"


def generate() -> str:
    """A new random key, as text for `AIOTRANSFER_KEY`."""
    return f"atk1-{secrets.token_urlsafe(KEY_BYTES)}"


@functools.lru_cache(maxsize=16)
def _stretched(secret: bytes) -> bytes:
    if _GENERATED.fullmatch(secret):
        return secret
    return hashlib.scrypt(secret, salt=b"aiotransfer key 1", n=1 << 14, r=8, p=1, maxmem=64 << 20, dklen=KEY_BYTES)


class Key:
    """A secret and where it came from ("file" or "shared"; `source`: in words, with what chose it)."""

    __slots__ = ("_secret", "kind", "source")

    def __init__(self, kind: Literal["file", "shared"], secret: bytes, source: str = "") -> None:
        self.kind = kind
        self.source = source
        self._secret = secret

    def mac(self, role: str, transcript: bytes) -> bytes:
        """A proof of having the key, for one role in one conversation."""
        return hmac.new(self._secret, b"aiotransfer " + role.encode() + b"\0" + transcript, hashlib.sha256).digest()

    def verify(self, role: str, transcript: bytes, mac: bytes) -> bool:
        """Whether `mac` is that proof; takes the same time either way."""
        return hmac.compare_digest(self.mac(role, transcript), mac)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a key is not written down")

    def __repr__(self) -> str:
        return f"<Key {self.kind}>"


def load_key(key: bytes | str | None, environ: Mapping[str, str]) -> Key:
    """The key to use. Raises `TypeError`, `ValueError` (too short) or `ConfigurationError` (unsafe key
    file)."""
    source = "it was given as key=..."
    if key is None:
        key, source = environ.get("AIOTRANSFER_KEY") or None, "AIOTRANSFER_KEY"
        if key is None:
            return Key("file", *_user_key(environ))
        if len(key.encode(errors="surrogateescape")) < LEAST_BYTES:
            raise ConfigurationError(
                f"AIOTRANSFER_KEY has fewer than {LEAST_BYTES} bytes", hint="`python -m aiotransfer key` makes one"
            )
    if isinstance(key, str):
        key = key.encode(errors="surrogateescape")
    if not isinstance(key, bytes):
        raise TypeError(f"key must be bytes, not {type(key).__name__}")
    if len(key) < LEAST_BYTES:
        raise ValueError(f"a key has at least {LEAST_BYTES} bytes, not {len(key)}")
    return Key("shared", _stretched(key), source)


class Place(NamedTuple):
    """The directory of the user's key file, and what chose it."""

    directory: Path
    why: str


def key_place(environ: Mapping[str, str]) -> Place:
    """Where the user's key file lives: in XDG_RUNTIME_DIR, else in the temporary directory; or at home, where
    another user has taken that place, as any user may in a temporary directory. Raises `ConfigurationError`
    when there is no such place."""
    import tempfile  # here: the import of the package stays quick

    runtime = environ.get("XDG_RUNTIME_DIR")
    if runtime and os.path.isdir(runtime):
        return Place(Path(runtime) / "aiotransfer", f"XDG_RUNTIME_DIR={runtime}")
    unset = f"XDG_RUNTIME_DIR={runtime} is no directory" if runtime else "XDG_RUNTIME_DIR is not set"
    try:
        temporary = tempfile.gettempdir()
    except OSError:
        raise ConfigurationError(
            f"there is no place for the key file: {unset}, and no temporary directory can be written to",
            hint=f"set XDG_RUNTIME_DIR to a directory that this user can write to (a volume of type emptyDir, say), or {_ADVICE}",
        ) from None
    directory = Path(temporary) / f"aiotransfer-{os.getuid()}"
    chosen = next((f"{name}={temporary}" for name in ("TMPDIR", "TEMP", "TMP") if environ.get(name) == temporary), temporary)
    owner = _owner(directory)
    if owner in (None, os.getuid()):
        return Place(directory, f"{unset}, so below {chosen}")
    home = environ.get("HOME") or os.path.expanduser("~")
    if not os.path.isdir(home):
        raise ConfigurationError(
            f"there is no place for the key file: {unset}, {directory} belongs to uid {owner}, and there is no home directory",
            hint=f"set XDG_RUNTIME_DIR to a directory of this user, or {_ADVICE}",
        )
    return Place(Path(home) / ".aiotransfer", f"{unset}, and {directory} belongs to uid {owner}")


def _owner(path: Path) -> int | None:
    try:
        return path.lstat().st_uid
    except OSError:
        return None


def _refuse(path: Path, why: str) -> ConfigurationError:
    return ConfigurationError(f"the key file {path} cannot be trusted: {why}", hint=f"remove it, or {_ADVICE}")


def _unreadable(path: Path, error: OSError) -> TransferError:
    return shortage(error.errno, f"the key file {path} cannot be read") or _refuse(path, str(error))


def _unmade(path: Path, why: str, error: OSError) -> TransferError:
    return shortage(error.errno, f"the key file {path} cannot be made") or ConfigurationError(
        f"the key file {path} cannot be made ({why}): {error}",
        hint=f"set XDG_RUNTIME_DIR to a directory that this user can write to (a volume of type emptyDir, say), or {_ADVICE}",
    )


def _user_key(environ: Mapping[str, str]) -> tuple[bytes, str]:
    """The secret, and where it is."""
    directory, why = key_place(environ)
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        if _owner(directory) != os.getuid():  # another user made it first
            directory, why = key_place(environ)
    except OSError as error:
        raise _unmade(directory / "key", why, error) from error
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        info = directory.lstat()
    except OSError as error:
        raise _unreadable(directory, error) from error
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise _refuse(directory, "its directory belongs to another user or is open to others")
    return _secret_in(directory, why), f"it is that of {directory / 'key'} ({why})"


def _secret_in(directory: Path, why: str) -> bytes:
    path = directory / "key"
    try:
        return _read(path)
    except FileNotFoundError:
        pass
    # Racing creators each write a file of their own; the first link wins and all of them read that one.
    import tempfile

    try:
        fd, temporary = tempfile.mkstemp(dir=directory)
        try:
            with os.fdopen(fd, "wb") as f:
                f.write(os.urandom(KEY_BYTES))
            os.link(temporary, path)
        except FileExistsError:
            pass
        finally:
            os.unlink(temporary)
    except OSError as error:
        raise _unmade(path, why, error) from error
    return _read(path)


def _read(path: Path) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
            raise _refuse(path, "it belongs to another user or is open to others")
        secret = os.read(fd, KEY_BYTES + 1)
    finally:
        os.close(fd)
    if len(secret) != KEY_BYTES:
        raise _refuse(path, f"it holds {len(secret)} bytes instead of {KEY_BYTES}")
    return secret
