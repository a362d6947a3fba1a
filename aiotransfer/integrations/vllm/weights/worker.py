"""The engine of weight transfer in a vLLM worker.

Everything that touches the model is done by `update_weights`, in one call between two steps: no step can meet
a model that is half loaded. vLLM's `start_weight_update` and `finish_weight_update`, between which steps may
run, do nothing here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo

from aiotransfer.integrations.vllm import fields
from aiotransfer.integrations.vllm.weights import messages
from aiotransfer.integrations.vllm.weights.receiver import Receiver
from aiotransfer.weights import UpdateError


@dataclass
class AioTransferInitInfo(WeightTransferInitInfo):
    """What a trainer tells each worker first; see `messages.invitation`."""

    trainer: str
    layout: str
    timeout: float = 300.0
    listen: str = ""


@dataclass
class AioTransferUpdateInfo(WeightTransferUpdateInfo):
    """Which version the workers are to load."""

    epoch: int
    number: int


class AioTransferWeightTransferEngine(WeightTransferEngine):
    """Receives versions of the weights for one worker, and loads them into its model. Made by vLLM."""

    init_info_cls = AioTransferInitInfo
    update_info_cls = AioTransferUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: Any, model: Any) -> None:
        super().__init__(config, vllm_config, device, model)
        place = fields.place_of(vllm_config)
        self.receiver = Receiver(place.instance, place.rank, place.ranks)

    def init_transfer_engine(self, init_info: AioTransferInitInfo) -> None:
        """Meet the trainer that `init_info` names; other trainers may come later. Raises `ValueError`,
        `TransferError`."""
        layout, timeout = messages.read_layout(init_info.layout), messages.read_seconds(init_info.timeout)
        self.receiver.join(init_info.trainer, layout, timeout=timeout, listen=init_info.listen)

    def start_weight_update(self) -> None:
        """Nothing: steps may run until the weights are there."""

    def finish_weight_update(self) -> None:
        """Nothing: `update_weights` has loaded them."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load the version that `update_info` names, with "epoch" and "number". As `receive_weights`."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":  # there, asking for an accelerator is an error
            import torch

            torch.accelerator.synchronize()

    def receive_weights(self, update_info: AioTransferUpdateInfo) -> None:
        """Load the version that `update_info` names into the model. It has come as a whole before, or nothing
        is done.

        Raises `VersionError` and `TransferError`, and the model is as it was; and what the model's
        `load_weights` raises, or `UpdateError` when the version lacks parameters of the model: it is of no
        use then until a version has been loaded.
        """
        wanted = messages.read_version(update_info.epoch, update_info.number)
        with self.receiver.version(wanted) as tensors:
            load(self.model, self.model_config, tensors, wanted)

    def shutdown(self) -> None:
        """Leave the trainers; `init_transfer_engine` begins anew."""
        self.receiver.close()


def load(model: Any, model_config: Any, tensors: Mapping[str, Any], version: Any) -> None:
    """Fill `model`, whose `model_config` is vLLM's, with the `tensors` of a whole checkpoint, by vLLM's
    layerwise reload: it packs the weights for the kernels and keeps the memory that captured graphs read.
    `version`: for the text of errors."""
    missing: dict[str, str] = {}
    tied = fields.tied_layers(model)
    fields.begin_reload(model)
    try:
        wanted = fields.wanted_parameters(model, model_config)
        filled = fields.load(model, ((name, as_torch(tensor)) for name, tensor in tensors.items()))
        if wanted is not None and filled is not None:
            missing = dict.fromkeys(sorted(wanted - filled - tied.keys()), "no tensor of the checkpoint fills it")
            missing |= fields.half_filled(model, model_config)
    finally:
        # After an error, too: layers remember what they were given until this, and would mix it with the next
        # version.
        fields.end_reload(model, model_config)
    for layer in tied.values():
        fields.pack_again(layer)
    if missing:
        some = "; ".join(f"{name}: {why}" for name, why in list(missing.items())[:5])
        raise UpdateError(
            f"version {version} does not fill {len(missing)} parameters or layers of the model: {some}",
            version=version,
            missing=missing,
            hint="the model is of no use until a whole version has been loaded; compare the names of the trainer's model",
        )


def as_torch(tensor: Any) -> Any:
    """A view of an array as a torch `tensor`; a torch tensor as it is."""
    if not isinstance(tensor, np.ndarray):
        return tensor
    import torch

    return torch.from_numpy(tensor)
