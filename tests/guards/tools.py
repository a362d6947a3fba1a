"""Guards of installation and tests."""

from __future__ import annotations

from tests.guards.mutant import Mutant

GUARDS = (
    Mutant(
        "installation: a stamp is no link", "Makefile", "-m venv $(VENV)\n\t@touch $@",
        "-m venv $(VENV)\n\t@touch $@ $(VENV)/bin/python", "tests/system/test_build.py",
    ),
    Mutant(
        "plugin: names of our own", "aiotransfer_pytest.py", "def aiotransfer_payload(", "def payload(",
        "tests/testing/test_plugin.py",
    ),
)  # fmt: skip
