"""What our transport uses of Ray, as Ray 2.60 has it, in modules that take Ray's place: no Ray is needed, and none is started."""

from __future__ import annotations

import sys
import types
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest

OURS = "aiotransfer.integrations.ray.transport"


class RayDirectTransportError(Exception):
    """Ray's own error of a transfer."""


@dataclass
class CommunicatorMetadata:
    pass


@dataclass
class TensorTransportMetadata:
    tensor_meta: list[Any]
    tensor_device: str | None = None


@dataclass
class FetchRequest:
    obj_id: str
    tensors: list[Any]


class TensorTransportManager(ABC):
    """Its abstract methods."""

    @abstractmethod
    def tensor_transport_backend(self) -> str: ...

    @staticmethod
    @abstractmethod
    def is_one_sided() -> bool: ...

    @staticmethod
    @abstractmethod
    def can_abort_transport() -> bool: ...

    @abstractmethod
    def actor_has_tensor_transport(self, actor: Any) -> bool: ...

    @abstractmethod
    def extract_tensor_transport_metadata(self, obj_id: str, rdt_object: list[Any]) -> Any: ...

    @abstractmethod
    def get_communicator_metadata(self, src_actor: Any, dst_actor: Any, backend: str | None = None) -> Any: ...

    @abstractmethod
    def recv_multiple_tensors(
        self, obj_id: str, tensor_transport_metadata: Any, communicator_metadata: Any, target_buffers: Any = None
    ) -> list[Any]: ...

    @abstractmethod
    def send_multiple_tensors(self, tensors: Any, tensor_transport_metadata: Any, communicator_metadata: Any) -> None: ...

    @abstractmethod
    def garbage_collect(self, obj_id: str, tensor_transport_meta: Any, tensors: Any) -> None: ...

    @abstractmethod
    def abort_transport(self, obj_id: str, communicator_metadata: Any) -> None: ...


class Info(NamedTuple):
    transport_manager_class: type[Any]
    devices: list[str]
    data_type: type


class Context:
    """Where a process is: on which machine (`node`), in which actor."""

    node = "node 1"
    actor: str | None = None

    def get_node_id(self) -> str:
        return self.node

    def get_actor_id(self) -> str | None:
        return self.actor


def module(name: str, **names: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__dict__.update(names)
    made.__path__ = []
    return made


def install(monkeypatch: pytest.MonkeyPatch) -> Context:
    """Put the stub in Ray's place for one test."""
    context = Context()
    known: dict[str, Info] = {}
    managers: dict[str, Any] = {}

    def register(name: str, devices: list[str], manager: type[Any], data_type: type) -> None:
        if name.upper() in known:
            raise ValueError(f"Transport {name.upper()} already registered.")
        known[name.upper()] = Info(manager, devices, data_type)

    def manager(name: str) -> Any:
        if name not in known:
            raise ValueError(f"Unsupported tensor transport protocol: {name}")
        return managers.setdefault(name, known[name].transport_manager_class())

    bases = [TensorTransportManager, TensorTransportMetadata, CommunicatorMetadata, FetchRequest]
    rdt = module("ray.experimental.rdt")
    modules = {
        "ray": module(
            "ray", get=lambda ref: ref, get_runtime_context=lambda: context,
            util=module("ray.util", get_node_ip_address=lambda: "127.0.0.2"),
        ),
        "ray._private": module("ray._private"),
        "ray._private.ray_constants": module("ray._private.ray_constants", RDT_FETCH_FAIL_TIMEOUT_SECONDS=30.0),
        "ray.exceptions": module("ray.exceptions", RayDirectTransportError=RayDirectTransportError),
        "ray.experimental": module("ray.experimental"),
        "ray.experimental.rdt": rdt,
        "ray.experimental.rdt.tensor_transport_manager": module("bases", **{one.__name__: one for one in bases}),
        "ray.experimental.rdt.util": module(
            "util", transport_manager_info=known, register_tensor_transport=register, get_tensor_transport_manager=manager,
        ),
    }  # fmt: skip
    modules["ray._private"].ray_constants = modules["ray._private.ray_constants"]  # type: ignore[attr-defined]
    for name, one in modules.items():
        monkeypatch.setitem(sys.modules, name, one)
    monkeypatch.delitem(sys.modules, OURS, raising=False)
    return context
