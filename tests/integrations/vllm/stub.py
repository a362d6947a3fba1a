"""A stub of what aiotransfer uses of vLLM, as 0.32 and 0.33 have it: modules that `install` puts in the place of vLLM's.

It keeps to vLLM's own behaviour where that is a trap: names are registered once, an update is started before it is finished,
layers remember what they were given until a reload has ended."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import pytest


class Factory:
    """Of engines by name."""

    _registry: dict[str, Callable[[], type]]

    def __init__(self) -> None:
        self._registry = {}

    def register_engine(self, name: str, module: str, class_name: str) -> None:
        if name in self._registry:
            raise ValueError(f"{name!r} is already registered")
        self._registry[name] = lambda: getattr(importlib.import_module(module), class_name)

    def trainer_init(self, init_info: Any, *, client: Any, source: Any = None) -> Any:
        return self._registry[init_info.backend]().trainer_init(init_info, client=client, source=source)  # type: ignore[attr-defined]

    def create_engine(self, backend: str, vllm_config: Any, model: Any) -> Any:
        config = types.SimpleNamespace(backend=backend)
        return self._registry[backend]()(config, vllm_config, types.SimpleNamespace(type="cpu"), model)


class WeightTransferEngine:
    """Of a worker."""

    init_info_cls: Any
    update_info_cls: Any

    def __init__(self, config: Any, vllm_config: Any, device: Any, model: Any) -> None:
        self.config, self.vllm_config, self.device, self.model = config, vllm_config, device, model
        self.model_config = vllm_config.model_config

    def parse_init_info(self, values: dict[str, Any]) -> Any:
        try:
            return self.init_info_cls(**values)
        except TypeError as error:
            raise ValueError(f"Invalid init_info: {error}") from error

    def parse_update_info(self, values: dict[str, Any]) -> Any:
        try:
            return self.update_info_cls(**values)
        except TypeError as error:
            raise ValueError(f"Invalid update_info: {error}") from error


@dataclass
class WeightTransferInitInfo:
    """Of a worker."""


@dataclass
class WeightTransferUpdateInfo:
    """Of a worker."""


@dataclass
class TrainerInitInfo:
    """Of a trainer rank."""

    backend: ClassVar[str]
    rank: int = field(kw_only=True)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        assert cls.backend

    @property
    def is_sender(self) -> bool:
        return self.rank == 0


class TrainerWeightTransferEngine:
    """Of a trainer rank."""

    def __init__(self, *, client: Any, source: Any = None, is_sender: bool = True) -> None:
        self.client, self.source, self.is_sender = client, source, is_sender


@dataclass(frozen=True)
class ParamMeta:
    """One tensor."""

    name: str
    dtype: Any
    shape: tuple[int, ...]


class Module:
    """What a trainer trains: `named_parameters` of a torch module, over arrays."""

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        self.parameters = dict(parameters)

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        return iter(self.parameters.items())


class Source32:
    """`ModuleSource` of 0.32: `metadata` is a method, iteration gives whole tensors."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, one.dtype, tuple(one.shape)) for name, one in self._module.named_parameters()]

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return iter(self._module.named_parameters())


class Source33:
    """`ModuleSource` of 0.33: `metadata` is a cached property, and there are two ways to iterate."""

    def __init__(self, module: Any) -> None:
        self._module = module

    @cached_property
    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, one.dtype, tuple(one.shape)) for name, one in self._module.named_parameters()]

    def iter_full(self) -> Iterator[tuple[str, Any]]:
        return iter(self._module.named_parameters())


SOURCES = {"0.32": Source32, "0.33": Source33}


class Model:
    """What serves: parameters by name, which a checkpoint fills. `reloading`: what a reload was given; None outside of one."""

    def __init__(self, names: Iterable[str]) -> None:
        self.parameters: dict[str, Any] = dict.fromkeys(names)
        self.reloading: dict[str, Any] | None = None
        self.reloads = 0
        self.layers: dict[str, Any] = {}

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        return iter(self.parameters.items())

    def named_modules(self) -> Iterator[tuple[str, Any]]:
        return iter(self.layers.items())

    def load_weights(self, tensors: Iterable[tuple[str, Any]]) -> set[str]:
        assert self.reloading is not None, "a model is loaded within a reload"
        filled = set()
        for name, tensor in tensors:
            if name not in self.parameters:
                raise ValueError(f"there is no parameter {name!r}")
            assert name not in self.reloading, "a layer remembers what it was given before"
            self.reloading[name] = tensor.copy()
            filled.add(name)
        return filled


class Layer:
    """A layer of a model, with the one parameter "weight". It counts how often its weights were packed for its kernel."""

    def __init__(self, weight: Any, came: int = 2) -> None:
        self.weight, self.packed, self.came = weight, 0, came
        self.quant_method = self

    def named_parameters(self, recurse: bool) -> Iterator[tuple[str, Any]]:
        return iter([("weight", self.weight)])

    def process_weights_after_loading(self, layer: Any) -> None:
        assert layer is self
        self.packed += 1


def get_layerwise_info(layer: Layer) -> Any:
    return types.SimpleNamespace(can_load=lambda: layer.came < 2, load_numel=layer.came, load_numel_total=2)


def initialize_layerwise_reload(model: Model) -> None:
    if model.reloading is None:
        model.reloading = {}


def finalize_layerwise_reload(model: Model, model_config: Any) -> None:
    assert model.reloading is not None
    model.parameters |= model.reloading
    model.reloading = None
    model.reloads += 1


def config_of(instance: str, rank: int = 0, ranks: int = 1, quantization: str | None = None) -> Any:
    """A `VllmConfig` of one worker."""
    parallel = types.SimpleNamespace(rank=rank, world_size=ranks, data_parallel_index=0)
    model = types.SimpleNamespace(quantization=quantization)
    return types.SimpleNamespace(instance_id=instance, parallel_config=parallel, model_config=model)


class Client:
    """vLLM's client of weight transfer, for workers in this process: each as vLLM's own worker drives its engine."""

    def __init__(self, workers: list[Any]) -> None:
        self.workers, self.active = workers, [False] * len(workers)
        self.calls: list[Any] = []

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.calls.append("init")
        for worker in self.workers:
            worker.init_transfer_engine(worker.parse_init_info(init_info))

    def start_weight_update(self) -> None:
        self.calls.append("start")
        for number, worker in enumerate(self.workers):
            if self.active[number]:
                raise RuntimeError("start_weight_update called while a weight update is already active")
            worker.start_weight_update()
            self.active[number] = True

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.calls.append("update")
        failed: list[Exception] = []
        for number, worker in enumerate(self.workers):
            try:
                worker.update_weights(update_info)
            except Exception as error:
                self.active[number] = False
                failed.append(error)
        if failed:
            raise failed[0]

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.calls.append(("finish", weight_version))
        inactive = not all(self.active)
        for number, worker in enumerate(self.workers):
            if self.active[number]:
                worker.finish_weight_update()
                self.active[number] = False
        if inactive:
            raise RuntimeError("finish_weight_update called without a matching start_weight_update")


def install(monkeypatch: pytest.MonkeyPatch, version: str) -> types.SimpleNamespace:
    """Put the stub of `version` in the place of vLLM until the test ends. Returns its two factories and its `ModuleSource`."""
    base = {
        one.__name__: one for one in (
            WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo, TrainerInitInfo, TrainerWeightTransferEngine,
        )
    }  # fmt: skip
    factories = {"WeightTransferEngineFactory": Factory(), "WeightTransferTrainerFactory": Factory()}
    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.distributed": {},
        "vllm.distributed.weight_transfer": {},
        "vllm.distributed.weight_transfer.base": {**base, "ModuleSource": SOURCES[version]},
        "vllm.distributed.weight_transfer.factory": factories,
        "vllm.model_executor": {},
        "vllm.model_executor.model_loader": {},
        "vllm.model_executor.model_loader.reload": {
            "initialize_layerwise_reload": initialize_layerwise_reload,
            "finalize_layerwise_reload": finalize_layerwise_reload,
        },
        "vllm.model_executor.model_loader.reload.layerwise": {"get_layerwise_info": get_layerwise_info},
    }
    for name, values in contents.items():
        module = types.ModuleType(name)
        module.__path__ = []
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    for name in ("worker", "trainer"):  # whose classes derive from vLLM's
        monkeypatch.delitem(sys.modules, f"aiotransfer.integrations.vllm.weights.{name}", raising=False)
    return types.SimpleNamespace(
        workers=factories["WeightTransferEngineFactory"], trainers=factories["WeightTransferTrainerFactory"],
        source=SOURCES[version],
    )  # fmt: skip
