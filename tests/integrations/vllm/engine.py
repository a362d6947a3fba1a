"""A running vLLM engine for the programs of these tests: `AsyncLLM`, whose model is in a process of its own."""

from __future__ import annotations

import asyncio
import os
from typing import Any

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "WARNING",
}  # fmt: skip

PROMPT = list(range(3, 43))


def start(folder: str, **options: Any) -> Any:
    """An engine that serves the model in `folder`, and receives weights by aiotransfer."""
    from vllm import AsyncEngineArgs
    from vllm.config.weight_transfer import WeightTransferConfig
    from vllm.v1.engine.async_llm import AsyncLLM

    given = {
        "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 8, "dtype": "bfloat16", "block_size": 32,
        "skip_tokenizer_init": True, "weight_transfer_config": WeightTransferConfig(backend="aiotransfer"),
    }  # fmt: skip
    return AsyncLLM.from_engine_args(AsyncEngineArgs(model=folder, **given | options))


class Client:
    """vLLM's client of weight transfer for an engine on the event loop `loop`: its calls are made in other threads."""

    def __init__(self, engine: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.engine, self.loop = engine, loop
        self.calls: list[str] = []

    def call(self, work: Any, name: str) -> None:
        self.calls.append(name)
        asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def pause(self) -> None:
        """Without it, prompts that were seen before are continued from what the weights before have left in the cache."""
        self.call(self.engine.pause_generation(mode="keep"), "pause")

    def resume(self) -> None:
        self.call(self.engine.resume_generation(), "resume")

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        self.call(self.engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info)), "init")

    def start_weight_update(self) -> None:
        self.call(self.engine.start_weight_update(), "start")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        self.call(self.engine.update_weights(WeightTransferUpdateRequest(update_info=update_info)), "update")

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.call(self.engine.finish_weight_update(weight_version), "finish")


class Requests:
    """Requests to an engine, each with a name of its own."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.count = engine, 0

    async def run(self, tokens: int, began: asyncio.Event | None = None) -> tuple[list[int], str]:
        """The continuation of the prompt, and why it ended. `began`: set when the first token is there."""
        from vllm import SamplingParams

        self.count += 1
        parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        tokens_of: Any = None
        async for output in self.engine.generate({"prompt_token_ids": PROMPT}, parameters, f"request {self.count}"):
            tokens_of = output.outputs[0]
            if began is not None:
                began.set()
        return list(tokens_of.token_ids), str(tokens_of.finish_reason)
