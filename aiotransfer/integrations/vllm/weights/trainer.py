"""The engine of weight transfer in a trainer process.

`send_weights` first brings the whole version to all workers, while their engine goes on, and only then has
them load it. What goes wrong before that leaves every model as it was."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

from vllm.distributed.weight_transfer.base import TrainerInitInfo, TrainerWeightTransferEngine

from aiotransfer.errors import ClosedError
from aiotransfer.integrations.vllm.weights import messages
from aiotransfer.integrations.vllm.weights.sender import FLOATS, Options, Sender
from aiotransfer.integrations.vllm.weights.sources import Weights, weights_of
from aiotransfer.weights import Version

Hook = Callable[[], object]


@dataclass
class AioTransferTrainerInitInfo(TrainerInitInfo):
    """How a trainer rank sends its weights. `rank`: its number, 0 on the one that leads.

    `listen`: where this rank's engine listens (default: loopback, any port); workers on other hosts need an
    address that they reach, and one `AIOTRANSFER_KEY` everywhere. `advertise`: the address that they use,
    where that is another one. `timeout`: seconds that meeting the workers, and each version, may take.
    `dtype`: floating tensors are cast to this type on their way, for instance "bfloat16" (default "": they
    are sent as they are, and the workers' models cast them). `pause` and `resume`: functions without
    arguments that rank 0 calls around the loading of a version that has come as a whole (default None: it is
    loaded between two steps of running requests); after an error in between, `resume` is not called.
    `checksum`, `fanout`, `rate_limit`: as for `aiotransfer.weights.Publisher`. `worker_listen`: where workers
    listen (default "": at the address by which they reach the trainer)."""

    backend: ClassVar[str] = "aiotransfer"

    _: KW_ONLY
    listen: str = "127.0.0.1:0"
    advertise: str | None = None
    timeout: float = 300.0
    dtype: str = ""
    pause: Hook | None = None
    resume: Hook | None = None
    checksum: bool = False
    fanout: str = "direct"
    rate_limit: float | None = None
    worker_listen: str = ""


class AioTransferTrainerWeightTransferEngine(TrainerWeightTransferEngine):
    """Sends the weights of one trainer rank. Made by `trainer_init`, or by vLLM's
    `WeightTransferTrainerFactory.trainer_init`."""

    init_info_cls = AioTransferTrainerInitInfo

    def __init__(
        self, weights: Weights, sender: Sender | None, info: AioTransferTrainerInitInfo, client: Any, source: Any
    ) -> None:
        super().__init__(client=client, source=source, is_sender=info.is_sender)
        self._weights, self._sender, self._info = weights, sender, info
        self._is_closed = False
        self.version: Version | None = None  # that the workers' models have, as far as this rank knows; None: of none

    @classmethod
    def trainer_init(
        cls, init_info: AioTransferTrainerInitInfo, *, client: Any, source: Any = None
    ) -> AioTransferTrainerWeightTransferEngine:
        """Meet the workers: called on every trainer rank. `init_info`: how this rank sends; `client`: vLLM's
        client of the serving engine, called by rank 0 alone; `source`: vLLM's `WeightSource`. Returns what
        sends.

        Raises `ValueError`, `TransferError`, and what `client` raises."""
        if init_info.dtype and init_info.dtype not in FLOATS:
            raise ValueError(f"dtype is one of {', '.join(sorted(FLOATS))}, or empty, not {init_info.dtype!r}")
        weights = weights_of(source, init_info.rank)
        weights.refresh()
        sender = None
        if weights.memory is not None:
            seconds = messages.read_seconds(init_info.timeout)
            options = Options(
                init_info.listen, init_info.advertise, seconds, init_info.checksum, init_info.fanout, init_info.rate_limit,
                init_info.dtype,
            )  # fmt: skip
            sender = Sender(weights.memory, addresses if weights.is_shared else alone, options)
        made = cls(weights, sender, init_info, client, source)
        try:
            if sender is not None and made.is_sender:
                client.init_weight_transfer_engine(
                    messages.invitation(sender.address, sender.offered, timeout=init_info.timeout, listen=init_info.worker_listen)
                )
        except BaseException:
            made.shutdown()
            raise
        return made

    def send_weights(self) -> None:
        """Bring the weights as they are now into the serving engine, as one version; called on every trainer
        rank. Ranks other than 0 return when the version has come as a whole, and may go on training then.

        Raises `aiotransfer.weights.UpdateError` when it did not come to all workers: they serve the version
        before. What is raised later, by the client, means that a worker may have loaded a part; `resume` has
        not been called then."""
        if self._is_closed:
            raise ClosedError("this trainer has been shut down", hint="trainer_init makes another")
        is_other = self._weights.refresh()
        if self._sender is None or self._weights.memory is None:
            return
        if is_other:
            self._sender.rebind(self._weights.memory)
        version = self._sender.publish()
        if self.is_sender:
            self._apply(version)
        self.version = version

    def _apply(self, version: Version) -> None:
        """All workers load a version that they have."""
        self.version = None
        if self._info.pause is not None:
            self._info.pause()
        self.client.start_weight_update()
        try:
            self.client.update_weights({"epoch": version.epoch, "number": version.number})
        except BaseException:
            with contextlib.suppress(Exception):  # workers that did load are told that it is over: else they refuse the next one
                self.client.finish_weight_update()
            raise
        self.client.finish_weight_update(weight_version=str(version))
        if self._info.resume is not None:
            self._info.resume()

    def shutdown(self) -> None:
        """Leave the workers, which keep the weights that they have. Twice is silent."""
        self._is_closed, sender, self._sender = True, self._sender, None
        if sender is not None:
            sender.close()


def alone(address: str) -> list[str]:
    """Of one rank: its `address`."""
    return [address]


def addresses(address: str) -> Sequence[str]:
    """The addresses of all trainer ranks, of which `address` is this one's: those of the default group of
    `torch.distributed`, where there is one."""
    torch = sys.modules.get("torch")
    dist = None if torch is None else torch.distributed
    if dist is None or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [address]
    found: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(found, address)
    return found
