"""A registry in etcd: an entry is a key with a lease. Needs the extra `etcd`
(`pip install aiotransfer[etcd]`).

The client speaks etcd's HTTP gateway with blocking calls, which a thread makes one after the other. Members
are asked for as often as the `Registry` says (`poll`), with one small request.
"""

from __future__ import annotations

import asyncio
import json
import math
from base64 import b64decode, b64encode
from typing import TYPE_CHECKING, Any, TypeVar

from aiotransfer.errors import BrokenError, ConfigurationError
from aiotransfer.kv.registry import bounds
from aiotransfer.kv.registry.worker import Worker
from aiotransfer.quote import quote

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

CALL_SECONDS = 2.0
PAGE = 512  # entries that are asked for at a time
MOST_ANSWER = 48 << 20  # bytes of one answer: of a page of the longest entries that there may be
MOST_LOOK = 4 * MOST_ANSWER  # and of all answers of one look, also of those that are too long


class EtcdBackend:
    """Entries under `prefix` in the etcd at `host` and `port`. See `Backend`.

    `options` go to `etcd3gw.Etcd3Client` (`protocol="https"`, `ca_cert`, `cert_cert`, `cert_key`, `session`).
    A request takes at most `timeout` seconds. A lease has whole seconds, and a server grants no less than
    about two.

    Raises `ConfigurationError` when the client is not installed, `ValueError`; its calls raise `BrokenError`.
    """

    def __init__(
        self, host: str = "localhost", port: int = 2379, *, prefix: str = "/aiotransfer/kv/", timeout: float = CALL_SECONDS,
        **options: Any,
    ) -> None:  # fmt: skip
        try:
            from etcd3gw.client import Etcd3Client
        except ImportError as error:
            raise ConfigurationError(f"etcd cannot be spoken to: {error}", hint="pip install 'aiotransfer[etcd]'") from error
        if not prefix or not prefix.isascii() or not prefix.isprintable():
            raise ValueError(f"prefix must be printable ASCII characters, not {quote(prefix)}")
        self.prefix = prefix
        self._connect: Callable[[], Any] = lambda: Etcd3Client(host=host, port=port, timeout=timeout, **options)
        self._client: Any = None
        self._leases: dict[str, Any] = {}  # by key, of what was put here
        self._worker = Worker("aiotransfer-registry")

    async def put(self, key: str, value: bytes, ttl: float) -> None:
        """See `Backend`."""

        def put() -> None:
            client = self._connected()
            lease = client.lease(max(1, math.ceil(ttl)))
            client.put(self.prefix + key, value, lease=lease)
            self._leases[key] = lease

        await self._call(put)

    async def keep_alive(self, key: str, ttl: float) -> bool:
        """See `Backend`. The seconds are those of `put`."""

        def refresh() -> bool:
            client = self._connected()
            lease = self._leases.get(key)
            # A deleted key leaves its lease behind, so both are asked for.
            return lease is not None and lease.refresh() > 0 and bool(client.get(self.prefix + key, keys_only=True))

        return await self._call(refresh)

    async def delete(self, key: str) -> None:
        """See `Backend`."""

        def delete() -> None:
            self._connected().delete(self.prefix + key)
            lease = self._leases.pop(key, None)
            if lease is not None:
                lease.revoke()

        await self._call(delete)

    async def entries(self) -> dict[str, bytes]:
        """See `Backend`."""

        return await self._call(self._pages)

    async def changed(self, seconds: float) -> None:
        """See `Backend`."""
        await asyncio.sleep(seconds)

    async def aclose(self) -> None:
        """See `Backend`."""
        client, self._client = self._client, None
        if client is not None:
            await self._worker.call(client.session.close)
        await self._worker.aclose()

    # ---- in the thread ----

    def _pages(self) -> dict[str, bytes]:
        """All entries, page by page. A page that is too long is asked for again in smaller ones, down to one
        entry, which is then left out: its key is not known, so those behind it are as well."""
        room, found = bounds.Room(), dict[str, bytes]()
        first, page, left = self.prefix.encode(), PAGE, MOST_LOOK
        end = first[:-1] + bytes([first[-1] + 1])
        while True:
            answer, nbytes = self._range(first, end, page, min(MOST_ANSWER, left))
            left -= nbytes
            entries = (answer or {}).get("kvs", [])
            for entry in entries:
                first = b64decode(entry["key"]) + b"\0"
                value = b64decode(entry.get("value", ""))
                if bounds.is_too_long(value) or not room.takes(len(value)):
                    bounds.complain("etcd")
                else:
                    found[first[:-1].decode("utf-8", "replace").removeprefix(self.prefix)] = value
            if answer is not None and not answer.get("more"):
                return found
            if room.full or left <= 0 or (answer is None and page == 1):
                bounds.complain("etcd")
                return found
            page = max(1, page // 8) if answer is None else min(PAGE, page * 8)

    def _range(self, first: bytes, end: bytes, page: int, most: int) -> tuple[Any, int]:
        """What the server says of the first entries there, and how many bytes were read; None: it says more
        than `most` bytes."""
        client = self._connected()
        asked = {"key": b64encode(first).decode(), "range_end": b64encode(end).decode(), "limit": page}
        with client.session.post(client.get_url("/kv/range"), json=asked, timeout=client.timeout, stream=True) as response:
            data = bytearray()
            for piece in response.iter_content(1 << 16):
                data += piece
                if len(data) > most:
                    return None, len(data)
        if response.status_code != 200:
            raise BrokenError(f"{response.status_code}: {bytes(data[:200]).decode('utf-8', 'replace')}")
        return json.loads(data), len(data)

    async def _call(self, work: Callable[[], T]) -> T:
        def translated() -> T:
            try:
                return work()
            except Exception as error:
                text = str(getattr(error, "detail_text", None) or error)[:200]
                words = f"etcd: {type(error).__name__}: {text}"
            raise BrokenError(words)  # here: what was caught holds the frames of the client, and with them its sockets

        return await self._worker.call(translated)

    def _connected(self) -> Any:
        if self._client is None:
            self._client = self._connect()
        return self._client
