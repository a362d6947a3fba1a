"""vLLM: new weights for engines that run, by vLLM's own interface for weight transfer.

    vllm serve MODEL --weight-transfer-config '{"backend": "aiotransfer"}'

vLLM finds this package by the entry point `vllm.general_plugins`. Importing it imports neither vLLM nor
torch.
"""

from __future__ import annotations

import logging

from aiotransfer.aio.ratelimit import RateLimit, more

__all__ = ["BACKEND", "register"]

BACKEND = "aiotransfer"  # what users type
_logger = logging.getLogger("aiotransfer")
_limit = RateLimit()


def register() -> None:
    """Tell vLLM about the two classes for weight transfer, under the name "aiotransfer". vLLM calls this in
    each of its processes; a trainer calls it before `WeightTransferTrainerFactory.trainer_init`. Twice is
    silent.

    It never raises: vLLM calls it wherever aiotransfer is installed, also for users who do not use it, and an
    error would end their process. A vLLM that lacks the interface says itself that there is no such backend;
    one whose interface is another is named in the log.
    """
    classes = "aiotransfer.integrations.vllm.weights"
    try:
        from aiotransfer.integrations.vllm import fields

        fields.register_weights(
            BACKEND,
            worker=(f"{classes}.worker", "AioTransferWeightTransferEngine"),
            trainer=(f"{classes}.trainer", "AioTransferTrainerWeightTransferEngine"),
        )
    except Exception as error:
        left_out = _limit.admit("register")
        if left_out is not None:
            _logger.warning("the weight transfer of this vLLM does not take aiotransfer: %r%s", error, more(left_out))
