"""What some tests need of the machine. Without it they are skipped, or fail with TESTS_REQUIRE=netns,tcp (as in `.ci/run`)."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest

from aiotransfer.providers.fabric import libfabric, libibverbs

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


def no_interpreter() -> str | None:
    """Why Triton's interpreter cannot be used here."""
    absent = [name for name in ("torch", "triton") if importlib.util.find_spec(name) is None]
    if absent:
        return f"{' and '.join(absent)} not installed (make test-triton installs them)"
    return None if os.environ.get("TRITON_INTERPRET") == "1" else "TRITON_INTERPRET is not 1 (make test-triton sets it)"


def skip_interpreter() -> None:
    """Unless it is there; a failure if it has to be."""
    if (reason := no_interpreter()) is not None:
        (pytest.fail if "triton" in REQUIRED else pytest.skip)(f"Triton's interpreter: {reason}")


def skip_gpu() -> Any:
    """Returns torch when it sees a GPU and kernels are compiled for it."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("no GPU: not tried")
    pytest.importorskip("triton", reason="Triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET is 1: nothing is compiled for the GPU")
    return torch
