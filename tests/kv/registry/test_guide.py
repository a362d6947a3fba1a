"""The example of the guide runs as it stands; and what is not used costs nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[3] / "docs" / "guide" / "kv-membership.md"


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=100, check=False)


def test_the_example(tmp_path: Path) -> None:
    (text,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    (tmp_path / "example.py").write_text(text)
    done = python("-W", "error", str(tmp_path / "example.py"))
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines()) == ["small: served by prefill-0", "small: served by prefill-1"]


def test_neither_the_registry_nor_a_client_of_etcd_is_imported_before_it_is_used() -> None:
    code = (
        "import sys, aiotransfer.kv\n"
        "print([name for name in sys.modules if name.startswith('aiotransfer.kv.registry')])\n"
        "import aiotransfer.kv.registry\n"
        "print([name for name in sys.modules if name in ('etcd3gw', 'requests', 'urllib3')])\n"
    )
    assert python("-c", code).stdout == "[]\n[]\n"
