"""A registry in etcd: an entry is a key with a lease. Needs the extra `etcd` (`pip install aiotransfer[etcd]`).

The client speaks etcd's HTTP gateway with blocking calls, which a thread makes one after the other. Members are asked for as
often as the `Registry` says (`poll`), with one small request.
"""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Any, TypeVar

from aiotransfer.errors import BrokenError, ConfigurationError
from aiotransfer.kv.registry.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

CALL_SECONDS = 2.0


class EtcdBackend:
    """Entries under `prefix` in the etcd at `host` and `port`. See `Backend`.

    `options` go to `etcd3gw.Etcd3Client` (`protocol="https"`, `ca_cert`, `cert_cert`, `cert_key`, `session`). A request takes
    at most `timeout` seconds. A lease has whole seconds, and a server grants no less than about two.

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
            raise ValueError(f"prefix must be printable ASCII characters, not {prefix!r}")
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
            # A key that somebody deleted leaves its lease behind, so both are asked for.
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

        def get() -> dict[str, bytes]:
            found = self._connected().get_prefix(self.prefix)
            return {bytes(about["key"]).decode("utf-8", "replace").removeprefix(self.prefix): value for value, about in found}

        return await self._call(get)

    async def changed(self, seconds: float) -> None:
        """See `Backend`."""
        await asyncio.sleep(seconds)

    async def aclose(self) -> None:
        """See `Backend`."""
        client, self._client = self._client, None
        if client is not None:
            await self._worker.call(client.session.close)
        await self._worker.aclose()

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
