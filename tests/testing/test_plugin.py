"""The pytest plugin, in pytest runs of its own: under pytest-asyncio (strict) and under anyio's plugin."""

from __future__ import annotations

import pytest

pytest_plugins = ["pytester"]

BODY = """
async def test_a_pair(engine_pair, payload, no_leaks):
    async with engine_pair(timeout=5) as pair:
        region = pair.right.allocate(64)
        pair.right.publish("memory", region)
        remote = await pair.right_peer.lookup("memory")
        source = pair.left.allocate(64)
        source.numpy()[:] = payload(64)
        await pair.left.write(source, remote, imm=1)
        await pair.right.counter(imm=1).wait(1, timeout=5)
        assert (region.numpy() == payload(64)).all()
        del region, remote, source


async def test_a_group(engine_group, no_leaks):
    import asyncio

    async with engine_group(3, timeout=5) as members:
        await asyncio.gather(*(member.group.barrier() for member in members))


@pytest.mark.aiotransfer(providers=["shm", "loopback"])
async def test_each_provider(engine_pair, aiotransfer_provider):
    async with engine_pair() as pair:
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


def test_a_failing_fabric_names_its_seed_and_the_seed_repeats_it(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        def test_x(fabric):
            async def scenario(net):
                left, right = await net.open_engine(), await net.open_engine()
                peer = await left.connect(right.address)
                for i in range(20):
                    left.signal(peer, i)
                await right.counter(imm=19).wait(1)
                print("trace", net.counts()["trace"])
                assert False

            fabric(split=0.1, delay=(1e-6, 1e-3)).run(scenario)
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
        async def test_engine(no_leaks):
            kept.append(await at.open_engine())

        def test_descriptor(no_leaks):
            kept.append(os.open("/dev/null", os.O_RDONLY))

        def test_fine(no_leaks):
            pass
        """
    )
    result = pytester.runpytest_subprocess(*QUIET[:-2], "-o", "asyncio_mode=strict")
    result.assert_outcomes(passed=3, errors=2)
    result.stdout.fnmatch_lines(["*left behind*open engines*", "*left behind*/dev/null*"])

