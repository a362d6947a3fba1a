"""The contract of the provider port, on every provider of this machine."""

from __future__ import annotations

from aiotransfer.testing.contract import ProviderContract


class TestShm(ProviderContract):
    provider = "shm"


class TestLoopback(ProviderContract):
    provider = "loopback"
