"""The contract of the provider port over verbs, on soft-RoCE."""

from __future__ import annotations

from aiotransfer.testing.contract import ProviderContract
from tests.needs import needs_verbs

pytestmark = needs_verbs()


class TestVerbs(ProviderContract):
    provider = "verbs"
