"""The example of the page about testing is run as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
PAGE = Path(__file__).parent.parent.parent / "docs" / "guide" / "testing.md"


def test_the_example_passes(pytester: pytest.Pytester) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    pytester.makepyfile(example)
    options = ("-o", "asyncio_mode=strict", "-o", "asyncio_default_fixture_loop_scope=function", "-W", "error")
    pytester.runpytest_subprocess("-p", "no:cacheprovider", *options).assert_outcomes(passed=4)
