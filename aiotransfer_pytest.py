"""The pytest plugin of aiotransfer: for applications that use it; installed with it, and silent until a fixture is asked for
(`-p no:aiotransfer` switches it off).

A top-level module, because pytest imports it in every run of every project that has aiotransfer installed: nothing of the package
(nor NumPy) is imported before a fixture is used. All names begin with `aiotransfer_`, so that no project's and no other plugin's
fixtures are taken for these; short names for those who ask are in `aiotransfer.testing.plugin`.

The fixtures are plain functions that give asynchronous context managers, so they work the same under pytest-asyncio (strict mode
included) and under anyio's plugin, on whatever loop the test runs:

- `aiotransfer_engine_pair(provider=None, **options)` and `aiotransfer_engine_group(n, provider=None, **options)`;
- `aiotransfer_fabric(seed=None, **options)`: a simulated fabric; its seed is shown when the test fails, `--aiotransfer-seed`
  repeats it;
- `aiotransfer_payload(nbytes, seed)`: bytes that say where they belong;
- `aiotransfer_no_leaks`: the test fails when it leaves engines, regions, descriptors, threads or mappings behind.

`@pytest.mark.aiotransfer(providers=["shm", "loopback"])` runs a test once with each provider; without it there is "loopback".
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from aiotransfer.testing.fabric import Fabric

_SEEDS: pytest.StashKey[list[int]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The seed of simulated fabrics."""
    group = parser.getgroup("aiotransfer")
    group.addoption("--aiotransfer-seed", type=int, default=None, help="seed of simulated fabrics (default: random)")


def pytest_configure(config: pytest.Config) -> None:
    """The marker."""
    config.addinivalue_line("markers", "aiotransfer(providers=[...]): run the test once with each of these providers")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One run for each provider of the marker."""
    marker = metafunc.definition.get_closest_marker("aiotransfer")
    if marker is None:
        return
    providers = marker.kwargs.get("providers")
    if marker.args or len(marker.kwargs) != 1 or not isinstance(providers, list | tuple) or not providers:
        node = metafunc.definition.nodeid
        pytest.fail(f'{node}: the marker is aiotransfer(providers=["shm", ...]), not {marker}', pytrace=False)
    if "aiotransfer_provider" in metafunc.fixturenames:
        metafunc.parametrize("aiotransfer_provider", providers, ids=providers)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """A failure names the seeds that repeat it."""
    report = yield
    seeds = item.stash.get(_SEEDS, [])
    if report.failed and seeds:
        report.sections.append(("aiotransfer", f"repeat with --aiotransfer-seed={seeds[0]} (fabrics: {seeds})"))
    return report


@pytest.fixture
def aiotransfer_provider() -> str:
    """The provider of this run of the test, if its marker does not say otherwise."""
    return "loopback"


@pytest.fixture
def aiotransfer_engine_pair(aiotransfer_provider: str) -> Callable[..., Any]:
    """`async with aiotransfer_engine_pair() as pair`: two connected engines of this process."""
    from aiotransfer.testing.pairs import engine_pair as make

    def pair(provider: str | None = None, **options: Any) -> Any:
        return make(provider or aiotransfer_provider, **options)

    return pair


@pytest.fixture
def aiotransfer_engine_group(aiotransfer_provider: str) -> Callable[..., Any]:
    """`async with aiotransfer_engine_group(4) as members`: engines of this process, each with its `PeerGroup`."""
    from aiotransfer.testing.pairs import engine_group as make

    def group(n: int, provider: str | None = None, **options: Any) -> Any:
        return make(n, provider or aiotransfer_provider, **options)

    return group


@pytest.fixture
def aiotransfer_fabric(request: pytest.FixtureRequest) -> Iterator[Callable[..., Fabric]]:
    """`aiotransfer_fabric(seed=7, split=0.2).run(scenario)`: whole engines on a simulated network and clock."""
    from aiotransfer.testing.fabric import fabric as make

    made: list[Fabric] = []
    seeds = request.node.stash.setdefault(_SEEDS, [])

    def build(seed: int | None = None, **options: Any) -> Fabric:
        if seed is None:
            given = request.config.getoption("--aiotransfer-seed")
            seed = random.getrandbits(32) if given is None else int(given)
        seeds.append(seed)
        made.append(make(seed, **options))
        return made[-1]

    yield build
    for one in made:
        one.close()


@pytest.fixture
def aiotransfer_payload() -> Callable[..., Any]:
    """`aiotransfer_payload(nbytes, seed=0)`: an array in which every 8 bytes say where they belong."""
    from aiotransfer.testing.payload import payload as make

    return make


@pytest.fixture
def aiotransfer_no_leaks() -> Iterator[None]:
    """Fail when the test leaves engines, regions, descriptors, threads or shared mappings behind."""
    import gc

    from aiotransfer.testing.leaks import leaks_since, snapshot

    gc.collect()
    before = snapshot()
    yield
    gc.collect()
    left = leaks_since(before)
    if left:
        pytest.fail("the test left behind: " + "; ".join(left), pytrace=False)
