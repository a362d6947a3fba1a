"""KV-cache hand-off: one process reads a prompt with a language model, another continues the text.

The decode worker owns the pages of a paged KV cache and publishes them. The prefill worker runs the prompt through the model; as
soon as a layer's keys and values exist they are copied into its own pages and written into the decode worker's with one
`write_pages` call per layer, while the next layers are still being computed. The decode worker counts pages, is told the prompt's
length and the last token (never the prompt), and goes on from there.

Run by `python -m aiotransfer demo`; only the public API of aiotransfer is used.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig
from transformers.cache_utils import CacheLayerMixin

import aiotransfer as at

PAGE = 16  # tokens
MOST_TOKENS = 1024
PAGES_LANDED = 1  # the immediate that travels with every page


def load_model(name: str, directory: str) -> Any:
    """The model, on one thread: two workers on a small machine would otherwise wait for each other's threads."""
    torch.set_num_threads(1)
    if name == "tiny":
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=1000, hidden_size=256, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
            intermediate_size=688, max_position_embeddings=4096, bos_token_id=1, eos_token_id=None, pad_token_id=0,
            initializer_range=0.15,
        )  # fmt: skip
        return AutoModelForCausalLM.from_config(config).eval()
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()


class Pool:
    """Pages of keys and values in memory of an engine: [layer, page, keys or values, head, token, dim]."""

    def __init__(self, engine: at.Engine, config: Any, dtype: torch.dtype, pages: int) -> None:
        heads = config.num_key_value_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.layers, self.pages = config.num_hidden_layers, pages
        self.region = engine.allocate((self.layers, pages, 2, heads, PAGE, dim), dtype)
        self.tensor = self.region.torch()
        self.page_bytes = 2 * heads * PAGE * dim * self.tensor.element_size()


class PagedLayer(CacheLayerMixin):
    """One layer of a cache that lives in pages of a pool, in any page order."""

    is_sliding = False

    def __init__(self, pool: torch.Tensor, table: torch.Tensor, filled: int = 0) -> None:
        super().__init__()
        self.pool, self.table, self.filled, self.is_initialized = pool, table, filled, True
        self.dtype, self.device = pool.dtype, pool.device

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the pages exist."""

    def put(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Append the keys and values of new tokens."""
        position = torch.arange(self.filled, self.filled + keys.shape[-2])
        pages, slots = self.table[position // PAGE], position % PAGE
        self.pool[pages, 0, :, slots] = keys[0].transpose(0, 1)
        self.pool[pages, 1, :, slots] = values[0].transpose(0, 1)
        self.filled += keys.shape[-2]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """What attention calls: append, then show everything in order."""
        self.put(key_states, value_states)
        used = self.pool[self.table[: -(-self.filled // PAGE)]]
        keys, values = (used[:, i].transpose(0, 1).flatten(1, 2)[None, :, : self.filled] for i in (0, 1))
        return keys, values

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return self.filled + (query_length if isinstance(query_length, int) else len(query_length)), 0

    def get_seq_length(self) -> int:
        return self.filled

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1


class StreamingCache(DynamicCache):
    """Tells `ready(layer, keys, values)` as soon as a layer's keys and values exist, before its own attention runs."""

    def __init__(self, config: Any, ready: Callable[[int, torch.Tensor, torch.Tensor], None]) -> None:
        super().__init__(config=config)
        self._ready = ready

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kw: Any) -> Any:
        self._ready(layer_idx, key_states, value_states)
        return super().update(key_states, value_states, layer_idx, *args, **kw)


async def prefill(model: Any, tokens: list[int], address: str, flip_byte: bool = False) -> dict[str, Any]:
    """Run the prompt through the model; write each layer's pages as they come to be. Returns figures (times: CLOCK_MONOTONIC)."""
    async with at.open_engine(name="prefill") as engine:
        decoder = await engine.connect(address)
        remote = await decoder.lookup("kv")
        pool = Pool(engine, model.config, model.dtype, MOST_TOKENS // PAGE)
        mine = np.arange(-(-len(tokens) // PAGE))
        theirs = np.frombuffer(await receive(engine), np.int64)[: len(mine)]  # the decoder chose where our pages go
        await decoder.send(json.dumps({"tokens": len(tokens)}).encode())
        loop, computed = asyncio.get_running_loop(), asyncio.Queue[int]()

        def ready(layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:  # called in the model's thread
            PagedLayer(pool.tensor[layer], torch.from_numpy(mine)).put(keys, values)
            if flip_byte and layer == pool.layers // 2:
                pool.tensor[layer].view(torch.uint8).view(-1)[pool.tensor.element_size() - 1] ^= 0x43  # sign and exponent
            loop.call_soon_threadsafe(computed.put_nowait, layer)

        def compute() -> tuple[int, float, float]:
            start = time.monotonic()
            with torch.inference_mode():
                cache = StreamingCache(model.config, ready)
                logits = model(torch.tensor([tokens]), past_key_values=cache, logits_to_keep=1).logits
            return int(logits[0, -1].argmax()), start, time.monotonic()

        async def send(layer: int) -> tuple[float, float]:
            start = time.monotonic()
            await engine.write_pages(
                pool.region, layer * pool.pages + mine, remote, layer * pool.pages + theirs,
                page_bytes=pool.page_bytes, imm=PAGES_LANDED,
            )  # fmt: skip
            return start, time.monotonic()

        computing = loop.run_in_executor(None, compute)
        async with asyncio.TaskGroup() as group:
            sending = [group.create_task(send(await computed.get())) for _ in range(pool.layers)]
        token, started, ended = await computing
        await decoder.send(json.dumps({"token": token}).encode())
        landed = json.loads(await receive(engine))["landed"]
        spans = [task.result() for task in sending]
        total = sum(end - start for start, end in spans)
        return {
            "prompt_tokens": len(tokens),
            "pages": pool.layers * len(mine),
            "bytes": pool.layers * len(mine) * pool.page_bytes,
            "prefill_started": started,
            "prefill_seconds": ended - started,
            "layer_transfer_seconds": [end - start for start, end in spans],
            "hidden_share": max(0.0, min(1.0, 1 - (landed - ended) / total)),
            "provider": decoder.path.provider,
        }


async def decode(model: Any, steps: int, say: Callable[..., None]) -> dict[str, Any]:
    """Own the pages, wait until they are full, continue greedily. `say(address=)` once, then `say(token=)` for each token."""
    async with at.open_engine(name="decode") as engine:
        pool = Pool(engine, model.config, model.dtype, MOST_TOKENS // PAGE)
        engine.publish("kv", pool.region)
        landed = engine.counter(imm=PAGES_LANDED)
        say(address=str(engine.address))
        prefiller = await anext(engine.arrivals())
        order = np.random.default_rng().permutation(pool.pages)  # pages need not be in order
        await prefiller.send(order.tobytes())
        count = json.loads(await receive(engine))["tokens"]
        await landed.wait(pool.layers * -(-count // PAGE), timeout=120, peers=[prefiller])
        at_time = time.monotonic()
        token = json.loads(await receive(engine))["token"]
        await prefiller.send(json.dumps({"landed": at_time}).encode())
        say(token=token, time=time.monotonic())

        cache = DynamicCache(config=model.config)
        cache.layers = [PagedLayer(layer, torch.from_numpy(order), count) for layer in pool.tensor]
        tokens = [token]
        while len(tokens) < steps:
            tokens.append(await asyncio.to_thread(next_token, model, tokens[-1], cache))
            say(token=tokens[-1])
        return {"tokens": tokens}


def next_token(model: Any, token: int, cache: Any) -> int:
    """One greedy step."""
    with torch.inference_mode():
        return int(model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1].argmax())


def alone(model: Any, tokens: list[int], steps: int) -> list[int]:
    """The same continuation in a single process."""
    ids = torch.tensor([tokens])
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, min_new_tokens=steps, do_sample=False
        )
    return [int(t) for t in out[0, len(tokens) :]]


async def receive(engine: at.Engine) -> bytes:
    """The next message."""
    async with asyncio.timeout(120):
        async for message in engine.messages():
            return message.data
    raise at.ClosedError("the engine was closed")


def main() -> None:
    """A worker: `kv_handoff.py prefill|decode|alone JSON`. Prints one JSON object per line."""
    role, job = sys.argv[1], json.loads(sys.argv[2])

    def say(**fields: Any) -> None:
        print(json.dumps(fields), flush=True)

    model = load_model(job["model"], job["directory"])
    say(loaded=os.getpid())
    if role == "alone":
        say(result=alone(model, job["prompt"], job["tokens"]))
    elif role == "decode":
        say(result=asyncio.run(decode(model, job["tokens"], say)))
    else:
        address = sys.stdin.readline().strip()
        say(result=asyncio.run(prefill(model, job["prompt"], address, job.get("flip_byte", False))))


if __name__ == "__main__":
    main()
