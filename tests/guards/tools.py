"""Guards of installation and tests."""

from __future__ import annotations

from tests.guards.mutant import Mutant

GUARDS = (
    Mutant(
        "installation: a stamp is no link", "Makefile", "-m venv $(VENV)\n\t@touch $@",
        "-m venv $(VENV)\n\t@touch $@ $(VENV)/bin/python", "tests/system/test_build.py",
    ),
    Mutant(
        "errors: a long argument is cut", "aiotransfer/quote.py",
        'return text if len(text) <= MOST else f"{text[: MOST // 2]}...{text[-MOST // 2 :]}"', "return repr(value)",
        "tests/test_quote.py",
    ),
    Mutant(
        "errors: an integer that Python does not word", "aiotransfer/quote.py",
        "        if value.bit_length() > 4 * MOST:\n", "        if False:\n", "tests/test_quote.py",
    ),
    Mutant(
        "plugin: names of our own", "aiotransfer_pytest.py", "def aiotransfer_payload(", "def payload(",
        "tests/testing/test_plugin.py",
    ),
)  # fmt: skip
