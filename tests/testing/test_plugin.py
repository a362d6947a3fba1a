"""The pytest plugin, in pytest runs of its own: under pytest-asyncio (strict) and under anyio's plugin."""

from __future__ import annotations

import pytest

pytest_plugins = ["pytester"]

BODY = """
async def test_a_pair(aiotransfer_engine_pair, aiotransfer_payload, aiotransfer_no_leaks):
    async with aiotransfer_engine_pair(timeout=5) as pair:
        region = pair.right.allocate(64)
        pair.right.publish("memory", region)
        remote = await pair.right_peer.lookup("memory")
        source = pair.left.allocate(64)
        source.numpy()[:] = aiotransfer_payload(64)
        await pair.left.write(source, remote, imm=1)
        await pair.right.counter(imm=1).wait(1, timeout=5)
        assert (region.numpy() == aiotransfer_payload(64)).all()
        del region, remote, source


async def test_a_group(aiotransfer_engine_group, aiotransfer_no_leaks):
    import asyncio

    async with aiotransfer_engine_group(3, timeout=5) as members:
        await asyncio.gather(*(member.group.barrier() for member in members))


@pytest.mark.aiotransfer(providers=["shm", "loopback"])
async def test_each_provider(aiotransfer_engine_pair, aiotransfer_provider):
    async with aiotransfer_engine_pair() as pair:
        assert pair.right_peer.path.provider == aiotransfer_provider
"""
ASYNCIO = "import pytest\n" + BODY.replace("async def test", "@pytest.mark.asyncio\nasync def test")
ANYIO = "import pytest\npytestmark = pytest.mark.anyio\n\n\n@pytest.fixture\ndef anyio_backend():\n    return 'asyncio'\n\n\n"
ANYIO += BODY
QUIET = ("-p", "no:randomly", "-p", "no:cacheprovider", "-o", "asyncio_default_fixture_loop_scope=function", "-W", "error")


@pytest.mark.parametrize(("source", "options"), [(ASYNCIO, ("-o", "asyncio_mode=strict")), (ANYIO, ())], ids=["asyncio", "anyio"])
def test_the_fixtures_work_under_both_plugins(pytester: pytest.Pytester, source: str, options: tuple[str, ...]) -> None:
    pytester.makepyfile(source)
    result = pytester.runpytest_subprocess(*QUIET, *options)
    result.assert_outcomes(passed=4)


@pytest.mark.parametrize("mark", ['["shm"]', 'provider=["shm"]', 'providers="shm"', "providers=[]", ""])
def test_a_marker_that_says_something_else_is_refused(pytester: pytest.Pytester, mark: str) -> None:
    pytester.makepyfile(f"import pytest\n@pytest.mark.aiotransfer({mark})\ndef test_x(aiotransfer_engine_pair):\n    pass\n")
    result = pytester.runpytest_subprocess(*QUIET)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*the marker is aiotransfer(providers=*"])


def test_a_test_without_the_marker_keeps_its_name(pytester: pytest.Pytester) -> None:
    body = "assert aiotransfer_provider == 'loopback'"
    pytester.makepyfile(f"def test_x(aiotransfer_engine_pair, aiotransfer_provider):\n    {body}\n")
    result = pytester.runpytest_subprocess(*QUIET, "-v")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*::test_x PASSED*"])


def test_a_failing_fabric_names_its_seed_and_the_seed_repeats_it(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        def test_x(aiotransfer_fabric):
            async def scenario(net):
                left, right = await net.open_engine(), await net.open_engine()
                peer = await left.connect(right.address)
                for i in range(20):
                    left.signal(peer, i)
                await right.counter(imm=19).wait(1)
                print("trace", net.counts()["trace"])
                assert False

            aiotransfer_fabric(split=0.1, delay=(1e-6, 1e-3)).run(scenario)
        """
    )
    first = pytester.runpytest_subprocess(*QUIET)
    first.assert_outcomes(failed=1)
    (line,) = [line for line in first.outlines if "--aiotransfer-seed=" in line]
    seed = line.split("--aiotransfer-seed=")[1].split()[0]
    second, third = (pytester.runpytest_subprocess(*QUIET, f"--aiotransfer-seed={s}") for s in (seed, int(seed) + 1))
    traces = [[line for line in run.outlines if line.startswith("trace")] for run in (first, second, third)]
    assert traces[0] == traces[1] != traces[2]


def test_what_a_test_leaves_behind_fails_it(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import os
        import pytest
        import aiotransfer as at

        kept = []

        @pytest.mark.asyncio
        async def test_engine(aiotransfer_no_leaks):
            kept.append(await at.open_engine())

        def test_descriptor(aiotransfer_no_leaks):
            kept.append(os.open("/dev/null", os.O_RDONLY))

        def test_fine(aiotransfer_no_leaks):
            pass
        """
    )
    result = pytester.runpytest_subprocess(*QUIET[:-2], "-o", "asyncio_mode=strict")
    result.assert_outcomes(passed=3, errors=2)
    result.stdout.fnmatch_lines(["*left behind*open engines*", "*left behind*/dev/null*"])


ANOTHER = """
import pytest

@pytest.fixture
def payload():
    return {"event": "push"}

@pytest.fixture
def fabric():
    return "an SSH connection"

@pytest.fixture
def engine_pair():
    return ("sqlite", "postgres")

@pytest.fixture
def engine_group():
    return "of database engines"

@pytest.fixture
def no_leaks():
    return "of water"
"""
USES = """
import sys

def test_of_a_stranger(payload, fabric, engine_pair, engine_group, no_leaks):
    assert payload == {"event": "push"}
    assert (fabric, engine_pair) == ("an SSH connection", ("sqlite", "postgres"))
    assert (engine_group, no_leaks) == ("of database engines", "of water")
    assert not {name for name in sys.modules if name.partition(".")[0] in ("aiotransfer", "numpy", "msgspec", "anyio")}
"""


@pytest.mark.parametrize("name", ["aaa_webhooks", "zzz_webhooks"])
def test_fixtures_of_other_plugins_are_theirs_and_nothing_is_imported_for_them(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Whichever of the two plugins comes first."""
    installed = pytester.mkdir("site") / f"{name}-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(f"[pytest11]\n{name} = {name}\n")
    (installed.parent / f"{name}.py").write_text(ANOTHER)
    pytester.makepyfile(USES)
    monkeypatch.setenv("PYTHONPATH", str(installed.parent))
    blocked = ("-p", "no:anyio", "-p", "no:hypothesispytest")  # these import what is looked for
    pytester.runpytest_subprocess(*QUIET, *blocked).assert_outcomes(passed=1)


@pytest.mark.parametrize("how", ['pytest_plugins = ["aiotransfer.testing.plugin"]', "from aiotransfer.testing.plugin import *"])
def test_short_names_are_there_for_projects_that_ask_and_their_own_come_first(pytester: pytest.Pytester, how: str) -> None:
    own = "import pytest\n\n@pytest.fixture\ndef payload():\n    return b'mine'\n"
    test = "def test_own(payload, fabric):\n    assert (payload, callable(fabric)) == (b'mine', True)\n"
    pytester.makeconftest(f"{how}\n")
    pytester.makepyfile(test_short=ASYNCIO.replace("aiotransfer_engine", "engine").replace("aiotransfer_payload", "payload"))
    pytester.makepyfile(test_own=own + test)
    pytester.runpytest_subprocess(*QUIET, "-o", "asyncio_mode=strict").assert_outcomes(passed=5)
