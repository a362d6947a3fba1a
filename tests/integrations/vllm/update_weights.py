"""A program: a trainer in this process, a vLLM engine in another. Prints one line of JSON with what was seen.

    python -m tests.integrations.vllm.update_weights FOLDER [tied]

The engine serves the model of seed 1 in FOLDER, whose head is its embedding where it is "tied". Trainers send
models that do not fit, then that of seed 2, then the first one again.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any

from tests.integrations.vllm import engine as engines
from tests.integrations.vllm import models

TOKENS = 16


async def main(folder: str, tied: bool) -> dict[str, Any]:
    from vllm.distributed.weight_transfer import ModuleSource, WeightTransferTrainerFactory

    from aiotransfer.integrations.vllm import register
    from aiotransfer.integrations.vllm.weights.trainer import AioTransferTrainerInitInfo

    register()
    began = time.perf_counter()
    seen: dict[str, Any] = {}
    engine = engines.start(folder)
    seen["started"] = time.perf_counter() - began
    requests, client = engines.Requests(engine), engines.Client(engine, asyncio.get_running_loop())
    seen["first"] = await requests.run(TOKENS)
    model, other = models.build(1, tied), models.build(2, tied)
    seen["alone"] = [models.continued(one, engines.PROMPT, TOKENS) for one in (model, other)]

    def init(sent: Any) -> Any:
        info = AioTransferTrainerInitInfo(rank=0, timeout=60, pause=client.pause, resume=client.resume)
        return WeightTransferTrainerFactory.trainer_init(info, client=client, source=ModuleSource(sent))

    async def fails(sent: Any) -> list[Any]:
        """What a model that does not fit comes to, and whether the engine is paused then."""
        trainer = await asyncio.to_thread(init, sent)
        try:
            await asyncio.to_thread(trainer.send_weights)
        except Exception as error:
            return [str(error), await engine.is_paused()]
        finally:
            await asyncio.to_thread(trainer.shutdown)
        return ["", False]

    seen["too much"] = await fails(models.with_more(2, tied))
    seen["too little"] = await fails(models.with_less(2, tied))
    client.calls.clear()
    trainer = await asyncio.to_thread(init, model)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, weights in (("other", other.state_dict()), ("back", own)):
        model.load_state_dict(weights)
        began = time.perf_counter()
        await asyncio.to_thread(trainer.send_weights)
        seen[f"{name} sent"] = time.perf_counter() - began
        seen[name] = await requests.run(TOKENS)
        seen[f"{name} version"] = await engine.get_weight_version()
    seen["calls"] = client.calls
    await asyncio.to_thread(trainer.shutdown)
    engine.shutdown()
    return seen


if __name__ == "__main__":
    print("SEEN", json.dumps(asyncio.run(main(sys.argv[1], sys.argv[2:] == ["tied"]))), flush=True)
    os._exit(0)
