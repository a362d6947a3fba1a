"""What may be sent to another process, and what says what to send in its place: every public class is one or the other."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import pkgutil
from typing import Any

import pytest

import aiotransfer
from aiotransfer.engine.runtime.unpicklable import Unpicklable

PACKAGES = ["aiotransfer", *(
    found.name for found in pkgutil.walk_packages(aiotransfer.__path__, "aiotransfer.")
    if found.ispkg and found.name.split(".")[1] in ("kv", "moe", "weights", "rendezvous")
)]  # fmt: skip
VALUES = {
    "Address", "Config", "RemoteRegion", "Statistics", "Arrival", "Finished", "KVLayout", "PageTable", "RequestRecord",
    "TransferPlan",
    "Member", "Balance", "Cast", "Fuse", "Layout", "Piece", "Quantise", "Rename", "Split", "Stack", "Tensor", "Tie", "Transpose",
    "Unstack", "UpdateRecord", "Version",
}  # fmt: skip
OTHERS = {
    "Dispatched",  # holds a Handle, which refuses
    "EtcdBackend", "FileBackend", "MemoryBackend",  # of a registry; they hold no engine
    "weights.Plan",  # a value; the Plan of an engine is none
}


def public() -> dict[str, type]:
    """{package.name: class} of what packages offer, without errors, protocols, and tuples, which are as their elements are."""
    found: dict[str, type] = {}
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if not inspect.isclass(value) or getattr(value, "_is_protocol", False):
                continue
            if not issubclass(value, BaseException | tuple):
                found[f"{package}.{name}"] = value
    return found


def refused(thing: Any) -> str:
    """What is said when this is pickled or copied."""
    texts = set()
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match=f"{type(thing).__name__} cannot be pickled or copied") as error:
            attempt(thing)
        texts.add(str(error.value))
    (text,) = texts
    return text


def empty(kind: type) -> Any:
    """An object of this class that was never begun, and has nothing to end."""
    return object.__new__(type(kind.__name__, (kind,), {"__del__": lambda self: None}))


def test_every_public_class_is_a_value_or_says_what_to_send_in_its_place() -> None:
    classes = public()
    assert len(classes) > 50
    assert {"aiotransfer.weights.Publisher", "aiotransfer.kv.Decoder", "aiotransfer.moe.AllToAll"} <= classes.keys()
    for where, kind in classes.items():
        name = where.rpartition(".")[2]
        if issubclass(kind, Unpicklable):
            assert kind._instead in refused(empty(kind))
        else:
            known = name in VALUES or name in OTHERS or where.removeprefix("aiotransfer.") in OTHERS
            assert known, f"{where}: can it be sent to another process?"
