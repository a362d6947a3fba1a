"""Code of the host that fails is logged and changes nothing; what it does not have is not imported."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

import aiotransfer as at
from aiotransfer.telemetry import spans
from aiotransfer.telemetry.prometheus import Maker
from aiotransfer.telemetry.records import Host


def fail() -> None:
    raise KeyError("of the host")


def test_what_the_host_raises_is_logged_with_its_name_and_goes_no_further(caplog: pytest.LogCaptureFixture) -> None:
    assert not Host().call("the test", fail)
    assert "the test failed: Traceback" in caplog.text
    assert "KeyError: 'of the host'" in caplog.text
    assert Host().call("the test", lambda: None)


def test_the_log_keeps_nothing_that_the_failing_code_had(caplog: pytest.LogCaptureFixture) -> None:
    class Memory:
        """Of the host."""

    kept: list[weakref.ref[Memory]] = []

    def fail_with_memory() -> None:
        memory = Memory()
        kept.append(weakref.ref(memory))
        raise ValueError(memory)

    Host().call("the test", fail_with_memory)
    gc.collect()
    assert caplog.records
    assert kept[0]() is None


def test_a_call_that_fails_each_time_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    host = Host()
    for _ in range(100):
        host.call("one that always fails", fail)
    assert len(caplog.records) < 50


def test_without_the_extra_metrics_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(at.ConfigurationError, match=r"aiotransfer\[metrics\]"):
        Maker("test", None)


def test_no_span_begins_where_the_host_does_not_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("opentelemetry.trace", "opentelemetry.context"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert spans.current() is None
    assert spans.begin("test", "a span", None, 1.0) is None


def test_the_components_import_none_of_the_libraries() -> None:
    program = """
import sys
from aiotransfer import kv, moe, weights
from aiotransfer.weights import metrics
from aiotransfer.weights.records import tracing
from aiotransfer.telemetry.records import Host
from aiotransfer.weights.records.progress import Shows
Shows(None, Host()), Shows(print, Host())
libraries = {"prometheus_client", "opentelemetry", "rich", "tqdm"}
assert not libraries & {name.partition(".")[0] for name in sys.modules}
"""
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=True)
