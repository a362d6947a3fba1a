"""What some tests need of the machine. Without it they are skipped, or fail with TESTS_REQUIRE=netns,tcp (as in `.ci/run`)."""

from __future__ import annotations

import os

import pytest

from aiotransfer.providers import libfabric, libibverbs

REQUIRED = frozenset(filter(None, os.environ.get("TESTS_REQUIRE", "").split(",")))


def needs(name: str, missing: str | None) -> pytest.MarkDecorator:
    """A mark: skipped when `missing` says why this machine lacks `name`, unless it is required to be there."""
    if missing is not None and name in REQUIRED:
        raise RuntimeError(f"TESTS_REQUIRE names {name}, and it is missing: {missing}")
    return pytest.mark.skipif(missing is not None, reason=f"{name}: {missing}")


def needs_tcp() -> pytest.MarkDecorator:
    """libfabric, built in and installed."""
    return needs("tcp", libfabric.missing())


def needs_verbs() -> list[pytest.MarkDecorator]:
    """An RDMA device, such as the guest's of `make test-guest`, where a missing one is a failure."""
    return [needs("verbs", libibverbs.missing()), pytest.mark.one_loop]


def needs_hosts() -> list[pytest.MarkDecorator]:
    """Network namespaces, and tcp between them."""
    from tests.hosts.net import missing

    return [needs("netns", missing()), needs_tcp(), pytest.mark.one_loop]
