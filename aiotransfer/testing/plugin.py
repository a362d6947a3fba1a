"""Short names of the plugin's fixtures, for projects that ask for them, in a `conftest.py` at the root:

    pytest_plugins = ["aiotransfer.testing.plugin"]        # all of them
    from aiotransfer.testing.plugin import engine_pair     # or one, in any conftest.py

The plugin itself (`aiotransfer_pytest`) has them as `aiotransfer_engine_pair`, `aiotransfer_engine_group`,
`aiotransfer_fabric`, `aiotransfer_payload` and `aiotransfer_no_leaks` only: fixtures of other plugins and
projects have the short names, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from aiotransfer.testing.fabric import Fabric


@pytest.fixture
def engine_pair(aiotransfer_engine_pair: Callable[..., Any]) -> Callable[..., Any]:
    """The same as the fixture `aiotransfer_engine_pair`."""
    return aiotransfer_engine_pair


@pytest.fixture
def engine_group(aiotransfer_engine_group: Callable[..., Any]) -> Callable[..., Any]:
    """The same as the fixture `aiotransfer_engine_group`."""
    return aiotransfer_engine_group


@pytest.fixture
def fabric(aiotransfer_fabric: Callable[..., Fabric]) -> Callable[..., Fabric]:
    """The same as the fixture `aiotransfer_fabric`."""
    return aiotransfer_fabric


@pytest.fixture
def payload(aiotransfer_payload: Callable[..., Any]) -> Callable[..., Any]:
    """The same as the fixture `aiotransfer_payload`."""
    return aiotransfer_payload


@pytest.fixture
def no_leaks(aiotransfer_no_leaks: None) -> None:
    """The same as the fixture `aiotransfer_no_leaks`."""
