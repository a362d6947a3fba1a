"""The shared secret of a group of engines.

Given explicitly (argument or `AIOTRANSFER_KEY`), or, without one, a file that only this user can read: whoever can prove that he
has read it is a process of the same user on this host (or shares his runtime directory). The key is never printed or logged.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NoReturn

from aiotransfer.errors import ConfigurationError, TransferError, shortage

if TYPE_CHECKING:
    from pathlib import Path

KEY_BYTES = 32
LEAST_BYTES = 16


class Key:
    """A secret and where it came from ("file" or "shared")."""

    __slots__ = ("_secret", "kind")

    def __init__(self, kind: Literal["file", "shared"], secret: bytes) -> None:
        self.kind = kind
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
    """The key to use. Raises `TypeError`, `ValueError` (too short) or `ConfigurationError` (unsafe key file)."""
    if key is None:
        key = environ.get("AIOTRANSFER_KEY") or None
        if key is None:
            return Key("file", _user_key(environ))
        if len(key.encode(errors="surrogateescape")) < LEAST_BYTES:
            raise ConfigurationError(f"AIOTRANSFER_KEY has fewer than {LEAST_BYTES} bytes", hint="choose a longer secret")
    if isinstance(key, str):
        key = key.encode(errors="surrogateescape")
    if not isinstance(key, bytes):
        raise TypeError(f"key must be bytes, not {type(key).__name__}")
    if len(key) < LEAST_BYTES:
        raise ValueError(f"a key has at least {LEAST_BYTES} bytes, not {len(key)}")
    return Key("shared", key)


def key_directory(environ: Mapping[str, str]) -> Path:
    """Where the user's key file lives."""
    import tempfile  # here: the import of the package stays quick
    from pathlib import Path

    runtime = environ.get("XDG_RUNTIME_DIR")
    if runtime and os.path.isdir(runtime):
        return Path(runtime) / "aiotransfer"
    return Path(tempfile.gettempdir()) / f"aiotransfer-{os.getuid()}"


def _refuse(path: Path, why: str) -> ConfigurationError:
    return ConfigurationError(
        f"the key file {path} cannot be trusted: {why}",
        hint="remove it, or give all engines one key=... (or AIOTRANSFER_KEY)",
    )


def _unreadable(path: Path, error: OSError) -> TransferError:
    return shortage(error.errno, f"the key file {path} cannot be read") or _refuse(path, str(error))


def _user_key(environ: Mapping[str, str]) -> bytes:
    directory = key_directory(environ)
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        info = directory.lstat()
    except OSError as error:
        raise _unreadable(directory, error) from error
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise _refuse(directory, "its directory belongs to or is open to somebody else")
    path = directory / "key"
    try:
        return _read(path)
    except FileNotFoundError:
        pass
    # Racing creators each write a file of their own; the first link wins and everybody reads that one.
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
        raise _unreadable(path, error) from error
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
            raise _refuse(path, "it belongs to or is open to somebody else")
        secret = os.read(fd, KEY_BYTES + 1)
    finally:
        os.close(fd)
    if len(secret) != KEY_BYTES:
        raise _refuse(path, f"it holds {len(secret)} bytes instead of {KEY_BYTES}")
    return secret
