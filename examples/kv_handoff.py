"""KV-cache hand-off: two prefill ranks read prompts with a language model, a decode rank continues the texts.

Each prefill rank keeps half of the heads (TP 2), the decode rank all of them (TP 1). The decode rank reserves pages for a
prompt and asks both ranks to fill them; each layer is written as soon as its keys and values exist, while the next layers are
still being computed. The decode rank counts what arrives, takes the first token from the tail, and goes on from there; several
prompts are under way at once. When a prefill rank dies in the middle, the request is asked for again, of the rank that takes
its place.

On a CPU both ranks compute the whole forward pass and keep their own heads of it: what is shown is the hand-off, not the
arithmetic.

Run by `python -m aiotransfer demo`; only the public API of aiotransfer is used.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig
from transformers.cache_utils import CacheLayerMixin

import aiotransfer as at
from aiotransfer import kv

PAGE = 16  # tokens
PAGES = 256
RANKS = 2  # that prefill
DEADLINE = 120.0  # seconds, of one attempt


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


def layout_of(config: Any, dtype: torch.dtype, rank: int | None = None) -> kv.KVLayout:
    """How a worker keeps its pages: [layer, page, keys or values, head, token, dim]. `rank`: of prefill; None: decode."""
    heads = config.num_key_value_heads
    cut = -(-heads // RANKS)  # three heads are two and one
    part: dict[str, Any] = {}
    if rank is not None:
        part = {"tp": RANKS, "tp_rank": rank, "head_range": [(0, cut), (cut, heads)][rank]}
    return kv.KVLayout(
        layers=config.num_hidden_layers, kv_heads=heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        dtype=str(dtype).removeprefix("torch."), page_tokens=PAGE, num_pages=PAGES, order="HND", kind="together", **part,
    )  # fmt: skip


def allocate(engine: at.Engine, layout: kv.KVLayout, dtype: torch.dtype) -> at.Region:
    """The pool of a layout."""
    shape = (len(layout.own_layers), PAGES, 2, len(layout.own_heads), PAGE, layout.head_dim)
    return engine.allocate(shape, dtype)


class Pages:
    """Which pages are free. Waits when there are too few."""

    def __init__(self) -> None:
        self._free = np.random.default_rng().permutation(PAGES).tolist()  # pages need not be in order
        self._changed = asyncio.Condition()

    async def take(self, count: int) -> list[int]:
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._free) >= count)
            return [self._free.pop() for _ in range(count)]

    async def give(self, pages: list[int]) -> None:
        async with self._changed:
            self._free += pages
            self._changed.notify_all()


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


class GoneAway(Exception):
    """No request waits any more for what the model computes."""


class PrefillRank:
    """Fills what decode ranks ask for."""

    def __init__(self, model: Any, rank: int, job: dict[str, Any], say: Callable[..., None]) -> None:
        self.model, self.rank, self.job, self.say = model, rank, job, say
        self.model_turn = asyncio.Lock()

    async def run(self) -> None:
        dtype = self.model.dtype
        async with at.open_engine(name=f"prefill {self.rank}") as engine:
            layout = layout_of(self.model.config, dtype, self.rank)
            region = allocate(engine, layout, dtype)
            self.pool, self.heads, self.free = region.torch(), slice(layout.own_heads.start, layout.own_heads.stop), Pages()
            async with kv.Prefiller(engine, layout, region) as prefiller:
                self.say(address=str(engine.address))
                async with asyncio.TaskGroup() as group:
                    while True:
                        group.create_task(self.serve(await prefiller.accept()))

    async def serve(self, request: kv.PrefillRequest) -> None:
        prompt = json.loads(request.data)
        pages = await self.free.take(-(-len(prompt) // PAGE))
        try:
            async with request, self.model_turn:
                request.use(pages)
                started = time.time()
                token = await asyncio.to_thread(self.compute, request, prompt, pages)
                computed = time.time()
                await request.finish(np.array([token], np.int32))
                self.say(
                    figures={
                        "id": request.id, "started": started, "computed": computed,
                        "writes": [write[2:] for write in request.timeline],
                    },
                )  # fmt: skip
        except (at.TransferError, GoneAway):
            pass  # the decode side knows, and asks again if it still wants to
        finally:
            await self.free.give(pages)

    def compute(self, request: kv.PrefillRequest, prompt: list[int], pages: list[int]) -> int:
        """In the model's thread: the forward pass, each layer on its way as soon as it exists."""
        table = torch.tensor(pages)

        def ready(layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
            if request.cancelled:
                raise GoneAway
            PagedLayer(self.pool[layer], table).put(keys[:, self.heads], values[:, self.heads])
            if self.job.get("flip_byte") and layer == len(self.pool) // 2:
                self.pool[layer, pages[0]].view(torch.uint8).view(-1)[self.pool.element_size() - 1] ^= 0x43  # sign and exponent
            request.layer_ready(layer)
            if self.job.get("die") == request.id and layer == len(self.pool) // 2:
                os.kill(os.getpid(), signal.SIGKILL)

        with torch.inference_mode():
            cache = StreamingCache(self.model.config, ready)
            return int(self.model(torch.tensor([prompt]), past_key_values=cache, logits_to_keep=1).logits[0, -1].argmax())


class DecodeRank:
    """Has prompts filled, and continues them greedily."""

    def __init__(self, model: Any, job: dict[str, Any], say: Callable[..., None]) -> None:
        self.model, self.job, self.say = model, job, say
        self.addresses: dict[int, str] = {}  # of the prefill ranks, as they come and go
        self.news = asyncio.Event()
        self.model_turn = asyncio.Lock()

    def listen(self) -> None:
        """Lines of {"rank": ..., "address": ...}, from the process that starts the ranks."""
        loop = asyncio.get_running_loop()

        def read() -> None:
            for line in sys.stdin:
                loop.call_soon_threadsafe(self.moved, json.loads(line))

        threading.Thread(target=read, daemon=True).start()

    def moved(self, place: dict[str, Any]) -> None:
        self.addresses[place["rank"]] = place["address"]
        self.news.set()

    async def run(self) -> dict[str, Any]:
        self.listen()
        dtype = self.model.dtype
        async with at.open_engine(name="decode") as engine:
            layout = layout_of(self.model.config, dtype)
            region = allocate(engine, layout, dtype)
            self.engine, self.pool, self.free = engine, region.torch(), Pages()
            options = {"checksums": self.job.get("checksums", False)}
            async with kv.Decoder(engine, layout, region, **options) as self.decoder, asyncio.TaskGroup() as group:
                tasks = [group.create_task(self.answer(i, prompt)) for i, prompt in enumerate(self.job["prompts"])]
            return {"answers": [task.result() for task in tasks]}

    async def answer(self, number: int, prompt: list[int]) -> dict[str, Any]:
        """One prompt, from the request for its cache to the last token."""
        pages = await self.free.take(-(-(len(prompt) + self.job["tokens"]) // PAGE))
        asked, attempt = time.time(), 0
        while True:
            attempt += 1
            try:
                token, landed, path = await self.fill(f"prompt {number}, attempt {attempt}", prompt, pages)
                break
            except (at.PeerLostError, at.ClosedError, kv.RequestFailed):
                self.say(lost=number)  # the pages are free again: ask the rank that takes the place of the one that has gone
        first, tokens = time.time(), [token]
        cache = DynamicCache(config=self.model.config)
        cache.layers = [PagedLayer(layer, torch.tensor(pages), len(prompt)) for layer in self.pool]
        while len(tokens) < self.job["tokens"]:
            async with self.model_turn:
                tokens.append(await asyncio.to_thread(next_token, self.model, tokens[-1], cache))
        await self.free.give(pages)
        return {
            "tokens": tokens, "asked": asked, "landed": landed, "first": first, "attempts": attempt, "provider": path,
            "id": f"prompt {number}, attempt {attempt}",
        }  # fmt: skip

    async def fill(self, name: str, prompt: list[int], pages: list[int]) -> tuple[int, float, str]:
        """Have the cache of a prompt written into these pages. The first token, when all had landed, and by what path."""
        peers = [await self.peer(rank) for rank in range(RANKS)]
        data = json.dumps(prompt).encode()
        async with self.decoder.request(peers, name, pages, tokens=len(prompt), data=data, timeout=DEADLINE) as handle:
            arrival = await handle.arrived()
            return int(np.frombuffer(arrival.tail, np.int32)[0]), time.time(), peers[0].path.provider

    async def peer(self, rank: int) -> at.Peer:
        """The prefill rank, at wherever it is now."""
        while True:
            self.news.clear()
            if rank in self.addresses:
                try:
                    return await self.engine.connect(self.addresses[rank], timeout=1.0)
                except at.TransferError:
                    pass
            async with asyncio.timeout(DEADLINE):
                await self.news.wait()


def next_token(model: Any, token: int, cache: Any) -> int:
    """One greedy step."""
    with torch.inference_mode():
        return int(model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1].argmax())


def alone(model: Any, prompt: list[int], steps: int) -> list[int]:
    """The same continuation in a single process, with the library's own cache."""
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        logits = model(torch.tensor([prompt]), past_key_values=cache, logits_to_keep=1).logits
    tokens = [int(logits[0, -1].argmax())]
    while len(tokens) < steps:
        tokens.append(next_token(model, tokens[-1], cache))
    return tokens


def main() -> None:
    """A worker: `kv_handoff.py prefill|decode|alone JSON`. Prints one JSON object per line; ends with its standard input."""
    role, job = sys.argv[1], json.loads(sys.argv[2])

    def say(**fields: Any) -> None:
        print(json.dumps(fields), flush=True)

    model = load_model(job["model"], job["directory"])
    say(loaded=os.getpid())
    if role == "alone":
        say(result=[alone(model, prompt, job["tokens"]) for prompt in job["prompts"]])
    elif role == "decode":
        say(result=asyncio.run(decode(model, job, say)))
    else:
        asyncio.run(prefill(model, job, say))


async def decode(model: Any, job: dict[str, Any], say: Callable[..., None]) -> dict[str, Any]:
    return await DecodeRank(model, job, say).run()


async def prefill(model: Any, job: dict[str, Any], say: Callable[..., None]) -> None:
    """Serve until no process talks to this one any more."""
    serving = asyncio.create_task(PrefillRank(model, job["rank"], job, say).run())
    told = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    await asyncio.wait([serving, told], return_when=asyncio.FIRST_COMPLETED)
    serving.cancel()
    await asyncio.wait([serving])


if __name__ == "__main__":
    main()
