"""What a user meets first: names, errors, settings, and processes that end without a word."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import aiotransfer as at
from aiotransfer.config import Config
from tests.docs.complaints import complaints

ERRORS = [name for name in at.__all__ if isinstance(getattr(at, name), type) and issubclass(getattr(at, name), Exception)]

BAD_INPUT = """
import asyncio
import numpy as np
import aiotransfer as at

async def main():
    async with at.open_engine() as left, at.open_engine() as right:
        peer = await left.connect(right.address)
        src, target = left.allocate(8192), right.allocate(8192)
        right.publish("t", target)
        dst = await peer.lookup("t")
        closed = left.allocate(64)
        closed.close()
        closed.close()
        tries = [
            lambda: left.write(src[:8], dst[:9]),
            lambda: left.write(src[0:8193], dst),
            lambda: left.write(src[-1:5], dst),
            lambda: left.write(src[: 1 << 63], dst),
            lambda: left.write(closed, dst[:64]),
            lambda: left.write(target, dst),
            lambda: left.write(src, dst, imm=1 << 32),
            lambda: left.write(src, dst, imm=0xF0000000),
            lambda: left.write(src, dst, imm=-1),
            lambda: left.write_pages(src, [0], dst, [8], page_bytes=1024),
            lambda: left.write_pages(src, [-1], dst, [0], page_bytes=1024),
            lambda: left.write_pages(src, [1 << 63], dst, [0], page_bytes=1024),
            lambda: left.write_pages(src, [0, 1], dst, [0], page_bytes=1024),
            lambda: left.write_pages(src, [0.5], dst, [0], page_bytes=1024),
            lambda: left.write_pages(src, [0], dst, [0], page_bytes=1024, dst_stride=512),
            lambda: left.write_pages(src, [0], dst, [0], page_bytes=1024, src_stride=-1024),
            lambda: left.write_pages(src, [0], dst, [0], page_bytes=0),
            lambda: left.register(np.zeros((4, 4))[:, ::2]),
            lambda: left.register((0, 4096, "cpu")),
            lambda: left.register((16, 4096, "cpu")),
            lambda: left.register(np.array([object()])),
            lambda: at.RemoteRegion.decode(b"garbage"),
        ]
        refused = 0
        for attempt in tries:
            try:
                attempt()
            except (at.TransferError, TypeError, ValueError, RuntimeError):
                refused += 1
        try:
            await asyncio.to_thread(left.write, src, dst)
        except RuntimeError:
            refused += 1
        assert refused == len(tries) + 1, refused
        assert left.statistics().units_written == 0
        await left.write(src, dst)
    await left.aclose()
    try:
        left.write(src, dst)
    except at.ClosedError:
        print("ok")

asyncio.run(main())
"""


def script(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-X", "dev", "-c", code], capture_output=True, text=True, timeout=60, check=False)


def test_a_process_that_did_everything_wrong_ends_without_a_word() -> None:
    done = script(BAD_INPUT)
    assert (done.returncode, done.stdout, complaints(done.stderr)) == (0, "ok\n", "")


def test_without_the_extension_the_import_works_and_opening_says_why() -> None:
    done = script(
        "import sys; sys.modules['aiotransfer._native'] = None\n"
        "import asyncio, aiotransfer as at\n"
        "async def main():\n"
        "    try:\n"
        "        await at.open_engine()\n"
        "    except at.ProviderUnavailableError as error:\n"
        "        print(error.hint, error.attempts)\n"
        "asyncio.run(main())\n"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "install a C compiler" in done.stdout


@pytest.mark.parametrize("name", ERRORS)
def test_errors_pickle_with_all_they_carry(name: str) -> None:
    kind = getattr(at, name)
    error = kind("what happened", peer="h:1", rail="r", provider="shm", code=(5, "EIO"), hint="do this")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert (copy.peer, copy.rail, copy.provider, copy.code, copy.hint) == ("h:1", "r", "shm", (5, "EIO"), "do this")
    assert "do this" in str(copy)
    assert issubclass(kind, at.TransferError)


def test_the_tree_of_errors() -> None:
    assert issubclass(at.RegionError, IndexError)
    assert issubclass(at.StaleRegionError, at.RegionError)
    assert issubclass(at.TransferTimeout, TimeoutError)
    assert issubclass(at.ProviderUnavailableError, at.ConfigurationError)
    for kind in (at.PeerLostError, at.RailBrokenError, at.RemoteAccessError):
        assert issubclass(kind, at.BrokenError)


def test_settings_come_from_the_environment_and_mistakes_are_told() -> None:
    assert Config().with_environment({"AIOTRANSFER_PEER_TIMEOUT": "7.5"}).peer_timeout == 7.5
    with pytest.raises(at.ConfigurationError, match="soon"):
        Config().with_environment({"AIOTRANSFER_PEER_TIMEOUT": "soon"})
    with pytest.warns(UserWarning, match="did you mean AIOTRANSFER_PEER_TIMEOUT"):
        Config().with_environment({"AIOTRANSFER_PEER_TIMEOUTS": "1"})
    with pytest.raises((TypeError, ValueError)):
        Config(peer_timeout=-1.0)


@pytest.mark.parametrize(("text", "value"), [("off", False), ("0", False), ("No", False), (" on ", True), ("1", True)])
def test_switches_come_from_the_environment_in_the_usual_words(text: str, value: bool) -> None:
    assert Config(pin_threads=not value).with_environment({"AIOTRANSFER_PIN_THREADS": text}).pin_threads is value


def test_a_switch_is_no_number_and_a_number_no_switch() -> None:
    with pytest.raises(at.ConfigurationError, match="'maybe' is no bool"):
        Config().with_environment({"AIOTRANSFER_PIN_THREADS": "maybe"})
    with pytest.raises(TypeError, match="pin_threads must be True or False, not 1"):
        Config(pin_threads=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="peer_timeout must be a number"):
        Config(peer_timeout=True)


def test_the_package_is_marked_as_typed() -> None:
    assert (Path(at.__file__).parent / "py.typed").exists()
