"""The trainer's weights as memory that rests while it is published: that of the module itself, or a copy on
the host.

The parameters of a `ModuleSource` are published from where they lie, shards of FSDP included, and nothing is
gathered. Any other source gives whole tensors that may live for a moment only: rank 0 copies each into memory
of its own as it comes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from aiotransfer.integrations.vllm import fields
from aiotransfer.integrations.vllm.weights import messages


class Weights(ABC):
    """What a trainer rank publishes. `memory`: {name: tensor}, the tensors that are read, None on a rank that
    publishes nothing."""

    memory: Mapping[str, Any] | None
    is_shared: bool  # whether all ranks publish, each its part

    @abstractmethod
    def refresh(self) -> bool:
        """Bring `memory` up to date; called on all ranks before each version. Whether it is other memory than
        before. Raises `ValueError` for a source that does not keep to what it said."""


class InPlace(Weights):
    """The parameters of `module`, which are published from where they lie."""

    is_shared = True

    def __init__(self, module: Any) -> None:
        self._module = module
        self.memory: Mapping[str, Any] = dict(module.named_parameters())

    def refresh(self) -> bool:
        """See `Weights`."""
        now = dict(self._module.named_parameters())
        is_other = now.keys() != self.memory.keys() or any(now[name] is not tensor for name, tensor in self.memory.items())
        self.memory = now
        return is_other


class Copied(Weights):
    """Copies of the tensors of `source` on the host, made by the trainer with number `rank` if that is 0."""

    is_shared = False

    def __init__(self, source: Any, rank: int) -> None:
        self._source = source
        self._described = {one.name: one for one in fields.described(source)}
        self.memory: dict[str, Any] | None = None
        if rank == 0:
            import torch

            self.memory = {one.name: torch.empty(one.shape, dtype=one.dtype) for one in self._described.values()}

    def refresh(self) -> bool:
        """See `Weights`."""
        given: dict[str, tuple[int, ...]] = {}
        wanted = {name: one.shape for name, one in self._described.items()}
        for name, tensor in fields.whole_tensors(self._source):
            if self.memory is None or tensor is None:
                continue
            given[name] = tuple(tensor.shape)
            if wanted.get(name) == given[name]:
                self.memory[name].copy_(tensor.detach())
        if self.memory is not None and (problems := messages.differences(wanted, given)):
            raise ValueError(f"the source does not keep to its metadata: {'; '.join(problems[:5])}")
        return False


def weights_of(source: Any, rank: int) -> Weights:
    """The weights of a vLLM `WeightSource` on trainer rank `rank`. Raises `ValueError` for none."""
    if source is None:
        raise ValueError("a source of weights is needed: ModuleSource(model), or another WeightSource")
    module = fields.module_of(source)
    return Copied(source, rank) if module is None else InPlace(module)
