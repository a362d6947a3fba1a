"""A server for all tests of this folder, started by the first that needs it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kv.registry.etcd import Etcd


@pytest.fixture(scope="session")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    server = Etcd(tmp_path_factory.mktemp("etcd") / "data")
    yield server
    server.stop()
