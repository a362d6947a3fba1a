"""The contract of the provider port over verbs, on soft-RoCE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import aiotransfer as at
from aiotransfer.testing.contract import ProviderContract
from tests.needs import needs_verbs

pytestmark = needs_verbs()


class TestVerbs(ProviderContract):
    provider = "verbs"
    options: ClassVar[Mapping[str, Any]] = {"config": at.Config(peer_timeout=30)}  # nobody is lost for being slow
