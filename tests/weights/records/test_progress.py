"""How far an update has come is shown beside it, and what shows it can neither slow nor end it."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from aiotransfer.telemetry.records import Host
from aiotransfer.weights import Version
from aiotransfer.weights.records import progress
from aiotransfer.weights.records.progress import Shows
from tests.weights.party import Party

pytestmark = pytest.mark.asyncio


class Bar:
    """What was done with the bars of a library: its calls, in order."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.fails = False

    def note(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self.calls.append((name, options.get("completed")))
            if self.fails and name != "stop":
                raise OSError("no terminal")
            return 7

        return call


def install(monkeypatch: pytest.MonkeyPatch, library: str | None, *, terminal: bool = True) -> Bar:
    """Only this library is there (None: neither), on a terminal or not; bars appear at once."""
    bar = Bar()
    nothing = SimpleNamespace
    rich, console, tqdm = ModuleType("rich.progress"), ModuleType("rich.console"), ModuleType("tqdm")
    vars(console)["Console"] = nothing
    columns = ("TextColumn", "BarColumn", "DownloadColumn", "TransferSpeedColumn", "TimeElapsedColumn")
    vars(rich).update({name: lambda *_: None for name in columns})
    vars(rich)["Progress"] = lambda *_, **__: nothing(
        add_task=bar.note("add_task"), start=bar.note("start"), update=bar.note("update"), stop=bar.note("stop")
    )

    class Tqdm:
        n = 0

        def __init__(self, **options: Any) -> None:
            bar.note("start")(completed=options["initial"])

        def refresh(self) -> None:
            bar.note("update")(completed=self.n)

        close = bar.note("stop")

    vars(tqdm)["tqdm"] = Tqdm
    for name, module in (("rich.progress", rich), ("rich.console", console), ("tqdm", tqdm)):
        found = module if library is not None and name.startswith(library) else None
        monkeypatch.setitem(sys.modules, name, found)  # type: ignore[arg-type]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.0)
    return bar


async def one_update(party: Party, **options: Any) -> int:
    """Returns the bytes of it."""
    await party.train(1, timeout=20, **options)
    (server,) = await party.serve("a", 1)
    await party.publish(1)
    assert server.holds() == 1
    return party.trainers[0].publisher.records[-1].total


async def test_a_function_is_told_of_the_beginning_and_the_end_on_both_sides(party: Party) -> None:
    calls: dict[str, list[Any]] = {"publisher": [], "subscriber": []}
    await party.train(1, timeout=20, progress=lambda *told: calls["publisher"].append(told))
    (server,) = await party.serve("a", 1, progress=lambda *told: calls["subscriber"].append(told))
    await party.publish(1)
    await server.subscriber.aclose()
    total = party.trainers[0].publisher.records[0].total
    for told in calls.values():
        assert told[0] == (0, total, (1, 1))
        assert told[-1] == (total, total, (1, 1))
        assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)


async def test_a_function_that_fails_is_not_called_again_and_the_version_comes(
    party: Party, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[Any] = []

    def fail(*told: Any) -> None:
        calls.append(told)
        raise KeyError("of the host")

    await one_update(party, progress=fail)
    assert len(calls) == 1
    assert "of the host" in caplog.text
    await party.publish(2)
    assert len(calls) == 2, "the next update is shown again"


async def test_what_is_counted_never_falls_and_is_never_more_than_all() -> None:
    counts, told = iter([50, 20, 130]), []
    showing = Shows(lambda done, total, version: told.append(done), Host()).show(Version(1, 1), 100, lambda: next(counts))
    showing._look()
    showing.close()
    showing.close()
    assert told == [50, 50, 100]


@pytest.mark.parametrize("library", ["rich", "tqdm"])
async def test_a_bar_of_the_library_that_is_installed_is_drawn_and_taken_away(
    monkeypatch: pytest.MonkeyPatch, party: Party, library: str
) -> None:
    bar = install(monkeypatch, library)
    total = await one_update(party, progress=True)
    assert ("start", 0) in bar.calls or ("start", None) in bar.calls
    assert bar.calls[-2:] == [("update", total), ("stop", None)]
    assert [name for name, _ in bar.calls].count("stop") == 1


@pytest.mark.parametrize("library", ["rich", "tqdm"])
async def test_a_bar_is_taken_away_when_the_update_fails(monkeypatch: pytest.MonkeyPatch, party: Party, library: str) -> None:
    bar = install(monkeypatch, library)
    await party.train(1, timeout=20, progress=True)
    await party.serve("a", 1)
    with pytest.raises(ArithmeticError):
        async with party.trainers[0].publisher.publish(1):
            raise ArithmeticError
    assert bar.calls[-1] == ("stop", None)


async def test_a_bar_that_cannot_be_made_gives_way_to_lines(
    monkeypatch: pytest.MonkeyPatch, party: Party, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, "rich").fails = True
    await one_update(party, progress=True)
    assert "weights 1.1: " in capsys.readouterr().err


async def test_without_a_library_or_a_terminal_there_are_lines_on_standard_error(
    monkeypatch: pytest.MonkeyPatch, party: Party, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, "rich", terminal=False)
    await one_update(party, progress=True)
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert (shown.out, len(lines)) == ("", 2), "one at the beginning and one at the end"
    assert all(line.startswith("weights 1.1: 0.00 of 0.00 MB in ") for line in lines)


async def test_a_short_update_shows_nothing(
    monkeypatch: pytest.MonkeyPatch, party: Party, capsys: pytest.CaptureFixture[str]
) -> None:
    bar = install(monkeypatch, "rich")
    monkeypatch.setattr(progress, "FIRST_SECONDS", 3600.0)
    await one_update(party, progress=True)
    assert (bar.calls, capsys.readouterr().err) == ([], "")


async def test_a_process_without_standard_error_shows_nothing(monkeypatch: pytest.MonkeyPatch, party: Party) -> None:
    install(monkeypatch, None)
    monkeypatch.setattr(sys, "stderr", None)
    await one_update(party, progress=True)


@pytest.mark.parametrize("wanted", [None, False])
async def test_where_nothing_is_wanted_nothing_is_asked(wanted: Any) -> None:
    def asked() -> int:
        raise AssertionError

    Shows(wanted, Host()).show(Version(1, 1), 100, asked).close()
