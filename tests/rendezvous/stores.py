"""A store of one process, and what a store may do wrong."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any


class DictStore:
    """The least a store must be: set, get, wait."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self._changed = threading.Condition()

    def set(self, key: str, value: Any) -> None:
        with self._changed:
            self.values[key] = value
            self._changed.notify_all()

    def get(self, key: str) -> Any:
        return self.values[key]

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: all(key in self.values for key in keys), timeout.total_seconds()):
                raise RuntimeError("wait timeout")


class CheckedStore(DictStore):
    """As torch's are: it can also be asked without waiting, and for many at once."""

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def multi_get(self, keys: list[str]) -> list[Any]:
        return [self.values[key] for key in keys]


class StuckStore(DictStore):
    """Every call hangs until `release` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.release = threading.Event(), threading.Event()

    def set(self, key: str, value: Any) -> None:
        self.inside.set()
        self.release.wait()
