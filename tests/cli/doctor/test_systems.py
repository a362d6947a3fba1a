"""What `doctor` says of the systems that this library plugs into."""

from __future__ import annotations

import pytest

from aiotransfer.cli.doctor import systems

INSTALLED = {"ray": "2.60.0", "torch": "2.13.0"}


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systems, "installed", INSTALLED.get)


def test_no_ray_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systems, "installed", {}.get)
    fact = systems.ray()
    assert (fact.level, fact.data["registers"]) == ("ok", False)
    assert "not installed" in fact.text


@pytest.mark.usefixtures("there")
def test_a_ray_with_which_the_transport_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systems, "PROGRAM", "print('registered')")
    fact = systems.ray()
    assert (fact.level, fact.hint) == ("ok", "")
    assert fact.data == {**INSTALLED, "registers": True}
    assert fact.text.startswith("2.60.0, torch 2.13.0; the tensor transport registers")


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("raise SystemExit(3)", "exit status 3"),
        ("import no_such_module_of_ray", "ModuleNotFoundError: No module named 'no_such_module_of_ray'"),
        ("pass", "exit status 0"),
        ("import time; time.sleep(60)", "importing Ray took more than 0.5 s"),
    ],
)
def test_a_ray_with_which_it_does_not(monkeypatch: pytest.MonkeyPatch, program: str, why: str) -> None:
    monkeypatch.setattr(systems, "PROGRAM", program)
    monkeypatch.setattr(systems, "SECONDS", 0.5 if "sleep" in program else 60.0)
    fact = systems.ray()
    assert (fact.level, fact.hint, fact.data["registers"]) == ("note", "docs/guide/ray.md", False)
    assert fact.text.endswith(f"does not register: {why}")
