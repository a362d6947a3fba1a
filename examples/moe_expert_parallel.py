"""Expert parallelism inside a model of `transformers`: each rank holds a part of the experts, tokens travel to them and back.

    python examples/moe_expert_parallel.py                  # Qwen3-MoE with random weights, text generation on 4 ranks
    python examples/moe_expert_parallel.py --mode blocks    # 16 positions of each sequence at a time
    python examples/moe_expert_parallel.py --kill 2         # and rank 2 is killed in the middle

Every rank has sequences of its own (data parallel) and its share of each layer's experts; it drops the weights of the others. The
model is that of the library, and so is `generate`: `transformers` calls `ExpertParallel` where its own experts would compute.
The forward pass is synchronous, so the engine lives on a loop in a thread of its own and `thread.run` waits for it.

Every rank has to call every MoE layer equally often. One whose sequences have ended takes part with no tokens until all have
(`Turns`).

The main process starts the ranks, runs the whole model by itself and compares logits and tokens: it ends with status 1 if they
differ. Only the public API of aiotransfer is used.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import json
import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch
from torch.nn.functional import linear
from transformers import DynamicCache, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import aiotransfer as at
from aiotransfer import moe

EXPERTS, TOPK, LAYERS, HIDDEN, WORDS = 8, 2, 4, 256, 1000
PAD, MASK = 0, WORDS - 1  # MASK: a position of a block that is not decided yet
BLOCK, DENOISING = 16, 4  # positions of a block; passes that decide them
TOLERANCE = 1e-4
DEADLINE = 60.0  # seconds, of one call
# The name under which the model takes its cache was changed by the library.
CACHE = "cache" if "cache" in inspect.signature(Qwen3MoeForCausalLM.forward).parameters else "past_key_values"


def load_model() -> Any:
    """The same random weights in every process, on one thread: ranks on a small machine would wait for each other's threads."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=WORDS, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=8, num_key_value_heads=2, head_dim=32,
        num_experts=EXPERTS, num_experts_per_tok=TOPK, moe_intermediate_size=128, norm_topk_prob=True, mlp_only_layers=[],
        max_position_embeddings=4096, bos_token_id=1, eos_token_id=None, pad_token_id=PAD, initializer_range=0.15,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


# ---- the plug ----


class Call(NamedTuple):
    """One layer of one pass, as a rank saw it."""

    step: int
    dispatch: float  # seconds
    combine: float
    rows: int  # that left this rank; as many results came back
    results: int  # that left this rank
    lost: tuple[int, ...]
    dropped: int  # choices


class ExpertParallel:
    """What the library calls instead of a layer's experts: `forward(experts, hidden, top_k_index, top_k_weights)`."""

    def __init__(self, thread: at.EngineThread, a2a: moe.AllToAll) -> None:
        self.thread, self.a2a = thread, a2a
        self.local = EXPERTS // a2a.group_size
        self.real: torch.Tensor | None = None  # which of the tokens are no padding
        self.calls: list[Call] = []
        self.between: Callable[[torch.Tensor], object] = lambda _: None  # with the results, before they are sent

    def shard(self, model: Any) -> None:
        """Drop the experts of the other ranks, and have the library call `forward`."""
        mine = slice(self.a2a.rank * self.local, (self.a2a.rank + 1) * self.local)
        for layer in model.model.layers:
            experts = layer.mlp.experts
            for name in ("gate_up_proj", "down_proj"):
                setattr(experts, name, torch.nn.Parameter(getattr(experts, name)[mine].clone(), requires_grad=False))
        ALL_EXPERTS_FUNCTIONS.register("aiotransfer", self.forward)
        model.set_experts_implementation("aiotransfer")

    def forward(self, experts: Any, hidden: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Tokens to their experts, those of this rank applied to what came, results back and summed."""
        if self.real is not None:
            idx = idx.masked_fill(~self.real[:, None], -1)  # no expert needs to see padding
        began = time.perf_counter()
        got = self.thread.run(self.a2a.dispatch(hidden, idx, weights.float()))
        there = time.perf_counter()
        results = self.compute(experts, got)
        self.between(results)
        ready = time.perf_counter()
        out = self.thread.run(self.a2a.combine(results, got.handle))
        back = time.perf_counter()
        handle, kept = got.handle, int((idx // self.local == self.a2a.rank).sum())
        sent, returned, dropped = int((idx >= 0).sum()) - kept, int(got.counts.sum()) - kept, int(handle.dropped.sum())
        self.calls.append(Call(handle.step, there - began, back - ready, sent, returned, handle.lost, dropped))
        return out.to(hidden.dtype)

    def compute(self, experts: Any, got: moe.Dispatched) -> torch.Tensor:
        """The experts of this rank, each on its rows, which lie one after another."""
        results = torch.empty_like(got.x)
        for e, (begin, count) in enumerate(zip(got.offsets.tolist(), got.counts.tolist(), strict=True)):
            rows = slice(begin, begin + count)
            gate, up = linear(got.x[rows], experts.gate_up_proj[e]).chunk(2, -1)
            results[rows] = linear(experts.act_fn(gate) * up, experts.down_proj[e])
        return results


class Turns:
    """Who makes another pass of the model. Those who do say so beforehand; those who are done ask whether to take part."""

    PREFIX = b"turns"

    def __init__(self, engine: at.Engine, addresses: list[str]) -> None:
        self.engine, self.addresses = engine, addresses
        self.peers: dict[at.Peer, int] = {}  # how many passes each has begun
        self.done: set[at.Peer] = set()
        self.mine = 0
        self.changed = asyncio.Condition()

    async def open(self) -> Turns:
        """Connected, and listening."""
        for address in self.addresses:
            if address != str(self.engine.address):
                self.peers[await self.engine.connect(address)] = 0
        self.tasks = [asyncio.create_task(self.listen()), *(asyncio.create_task(self.gone(peer)) for peer in self.peers)]
        return self

    async def listen(self) -> None:
        async for message in self.engine.messages(self.PREFIX):
            async with self.changed:
                if message.data == self.PREFIX:
                    self.done.add(message.peer)
                else:
                    self.peers[message.peer] = int(message.data.removeprefix(self.PREFIX))
                self.changed.notify_all()

    async def gone(self, peer: at.Peer) -> None:
        await peer.closed()  # lost, for instance
        async with self.changed:
            self.done.add(peer)
            self.changed.notify_all()

    async def tell(self, what: bytes) -> None:
        for peer in self.peers:
            try:
                await peer.send(self.PREFIX + what)
            except (at.BrokenError, at.ClosedError):
                pass  # it takes no part any more

    async def begin(self) -> None:
        """This rank makes another pass."""
        self.mine += 1
        await self.tell(b"%d" % self.mine)

    async def finish(self) -> None:
        """This rank has made its last one."""
        await self.tell(b"")

    async def another(self) -> bool:
        """Whether some other rank makes another pass: then this one takes part in it."""
        self.mine += 1
        async with self.changed:
            await self.changed.wait_for(lambda: self.coming() or len(self.done) == len(self.peers))
        return self.coming()

    def coming(self) -> bool:
        return any(passes >= self.mine for passes in self.peers.values())


# ---- decoding; nothing here knows of other processes ----


def padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts that end together, and which positions they fill."""
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
    filled = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, filled


class Decoded(NamedTuple):
    """What a model makes of some prompts."""

    logits: list[Any]  # of each prompt's tokens, as NumPy arrays
    tokens: list[list[int]]


def generate(model: Any, prompts: list[list[int]], new: int) -> Decoded:
    """Text generation by the library, greedy, with its KV cache; before it the logits of the prompts."""
    ids, filled = padded(prompts)
    logits = model(ids, attention_mask=filled, position_ids=positions(filled)).logits
    out = model.generate(ids, attention_mask=filled, max_new_tokens=new, do_sample=False)
    return Decoded(unpadded(logits, filled), out[:, ids.shape[1] :].tolist())


def blocks(model: Any, prompts: list[list[int]], new: int) -> Decoded:
    """Block diffusion: a block of `BLOCK` positions begins as nothing but masks. A pass sees all of it and what is before it, and
    decides the positions of which it is surest; when all are decided, one more puts the block into the cache."""
    ids, filled = padded(prompts)
    n, cache = len(prompts), DynamicCache(config=model.config)
    logits = model(ids, attention_mask=filled, position_ids=positions(filled), **{CACHE: cache}).logits
    lengths = filled.sum(1, keepdim=True)
    done = torch.empty(n, 0, dtype=torch.long)
    while done.shape[1] < new:
        at_position = lengths + done.shape[1] + torch.arange(BLOCK)
        seen = torch.cat([filled, torch.ones(n, done.shape[1] + BLOCK, dtype=torch.long)], 1)
        hidden = torch.zeros(n, 1, BLOCK, seen.shape[1]).masked_fill(seen[:, None, None] == 0, torch.finfo(torch.float32).min)
        block = torch.full((n, BLOCK), MASK)

        def look(block: torch.Tensor, where: torch.Tensor = at_position, hidden: torch.Tensor = hidden) -> torch.Tensor:
            return model(block, attention_mask=hidden, position_ids=where, **{CACHE: cache}).logits

        for _ in range(DENOISING):
            chances = look(block).index_fill(-1, torch.tensor(MASK), -torch.inf).softmax(-1)
            cache.crop(-BLOCK)
            sure, word = chances.max(-1)
            best = sure.masked_fill(block != MASK, -1).topk(BLOCK // DENOISING).indices
            block.scatter_(1, best, word.gather(1, best))
        look(block)
        done = torch.cat([done, block], 1)
    return Decoded(unpadded(logits, filled), done[:, :new].tolist())


def positions(filled: torch.Tensor) -> torch.Tensor:
    """Where in its sequence each token is."""
    return (filled.cumsum(1) - 1).clamp(min=0)


def unpadded(logits: torch.Tensor, filled: torch.Tensor) -> list[Any]:
    return [one[mask.bool()].numpy() for one, mask in zip(logits, filled, strict=True)]


MODES = {"generate": generate, "blocks": blocks}


# ---- a rank ----


def rank_main(rank: int, job: dict[str, Any], main: Connection) -> None:
    """One process: says its address, is told all, decodes its prompts and says what came out."""
    model = load_model()
    with at.run_in_thread(name=f"rank {rank}", timeout=DEADLINE) as thread:
        main.send({"address": str(thread.engine.address)})
        addresses = main.recv()
        a2a = thread.run(meet(thread.engine, addresses, job["max_tokens"]))
        try:
            main.send(decode(job, model, thread, a2a, thread.run(Turns(thread.engine, addresses).open())))
            main.recv()  # all are done: no rank is missed any more
        finally:
            thread.run(a2a.aclose())


async def meet(engine: at.Engine, addresses: list[str], max_tokens: int) -> moe.AllToAll:
    """One all-to-all for all layers: they are of the same sizes and follow one another."""
    return await moe.AllToAll(
        engine, engine.group(addresses), num_experts=EXPERTS, hidden=HIDDEN, dtype="float32", max_tokens=max_tokens, topk=TOPK,
        align=LAYERS, name="qwen3-moe",
    )  # fmt: skip


def decode(job: dict[str, Any], model: Any, thread: at.EngineThread, a2a: moe.AllToAll, turns: Turns) -> dict[str, Any]:
    """This rank's prompts, then the passes of the others."""
    rank, parallel = a2a.rank, ExpertParallel(thread, a2a)
    parallel.shard(model)
    own: int = job["new"][rank]

    def before(_: Any, args: tuple[Any, ...], fields: dict[str, Any]) -> None:
        ids, seen = fields["input_ids"] if "input_ids" in fields else args[0], fields.get("attention_mask")
        parallel.real = seen[:, -ids.shape[1] :].flatten().bool() if seen is not None and seen.dim() == 2 else None
        thread.run(turns.begin())

    model.register_forward_pre_hook(before, with_kwargs=True)
    if rank == job["kill"]:
        half = passes(job["mode"], own) // 2 * LAYERS + LAYERS // 2
        parallel.between = lambda _: os.kill(os.getpid(), signal.SIGKILL) if len(parallel.calls) == half else None
    elif rank == job["spoil"]:
        parallel.between = lambda results: results.neg_()
    with torch.inference_mode():
        decoded = MODES[job["mode"]](model, job["prompts"][rank], own)
        thread.run(turns.finish())
        parallel.real, idle = None, 0
        nothing = torch.empty(0, HIDDEN), torch.empty(0, TOPK, dtype=torch.long), torch.empty(0, TOPK)
        while thread.run(turns.another()):
            idle += 1
            for layer in model.model.layers:
                layer.mlp.experts(*nothing)
    return {
        "logits": decoded.logits, "tokens": decoded.tokens, "calls": [tuple(call) for call in parallel.calls], "idle": idle,
        "lost": {r: str(error) for r, error in a2a.lost.items()}, "paths": [peer.path.provider for peer in turns.peers],
    }  # fmt: skip


def passes(mode: str, new: int) -> int:
    """How often the model runs."""
    return 1 + new if mode == "generate" else 1 + -(-new // BLOCK) * (DENOISING + 1)


# ---- the main process ----


class RankFailed(Exception):
    """A rank ended without its result."""


class World:
    """The processes of all ranks. Whatever still runs at the end of the block is killed; if all went well, after a while."""

    def __init__(self, ranks: int, job: dict[str, Any]) -> None:
        context = multiprocessing.get_context("forkserver")  # imports torch once
        self.job = job
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(ranks):
            here, there = context.Pipe()
            process = context.Process(target=rank_main, args=(rank, job, there), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self) -> dict[int, dict[str, Any]]:
        """The results, by rank. Raises `RankFailed`."""
        everyone = range(len(self.pipes))
        addresses = [said["address"] for _, said in sorted(self.gather(everyone).items())]
        for pipe in self.pipes:
            pipe.send(addresses)
        results = self.gather(everyone)
        for rank, result in results.items():
            self.pipes[rank].send(None)
            result["calls"] = [Call(*call) for call in result["calls"]]
        return results

    def gather(self, ranks: Any) -> dict[int, Any]:
        """What each of them says next, but the one that is to be killed."""
        waiting, found = {self.pipes[rank]: rank for rank in ranks}, {}
        while waiting:
            for pipe in wait(list(waiting)):
                rank = waiting.pop(pipe)
                try:
                    found[rank] = self.pipes[rank].recv()
                except EOFError:
                    self.processes[rank].join()
                    if rank != self.job["kill"]:
                        raise RankFailed(f"rank {rank} ended with status {self.processes[rank].exitcode}") from None
        return found

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            process.join(10 if kind is None else 0)
            process.kill()
            process.join()
            pipe.close()


def without(ranks: int, lost: int, step: int) -> Callable[..., torch.Tensor]:
    """The library's experts, but from `step` on those of a lost rank give nothing."""
    count = iter(range(1 << 30))

    def forward(experts: Any, hidden: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        gone = (idx // (EXPERTS // ranks) == lost) & (next(count) >= step)
        result: torch.Tensor = ALL_EXPERTS_FUNCTIONS["grouped_mm"](experts, hidden, idx, weights.masked_fill(gone, 0))
        return result

    return forward


def compare(job: dict[str, Any], results: dict[int, Any], loss: dict[str, Any] | None) -> dict[str, Any]:
    """Each rank's prompts in this process, by the whole model."""
    model, worst, equal = load_model(), 0.0, True
    for rank, result in sorted(results.items()):
        if loss is not None:
            ALL_EXPERTS_FUNCTIONS.register("without", without(len(job["prompts"]), loss["rank"], loss["step"]))
            model.set_experts_implementation("without")
        with torch.inference_mode():
            expected = MODES[job["mode"]](model, job["prompts"][rank], job["new"][rank])
        for ours, theirs in zip(result["logits"], expected.logits, strict=True):
            worst = max(worst, float(abs(ours - theirs).max()))
        equal &= result["tokens"] == expected.tokens
    return {"logits_difference": worst, "logits_equal": worst <= TOLERANCE, "tokens_equal": equal}


def layers(results: dict[int, Any]) -> list[dict[str, float]]:
    """What a layer takes: median milliseconds of a call, and bytes that left all ranks in a pass, on average."""
    found = []
    for layer in range(LAYERS):
        calls = [call for result in results.values() for call in result["calls"] if call.step % LAYERS == layer]
        steps = len({call.step for call in calls})
        found.append(
            {
                "dispatch_ms": 1e3 * statistics.median(call.dispatch for call in calls),
                "combine_ms": 1e3 * statistics.median(call.combine for call in calls),
                "dispatch_bytes": sum(call.rows for call in calls) * HIDDEN * 4 / steps,
                "combine_bytes": sum(call.results for call in calls) * HIDDEN * 4 / steps,
            }
        )
    return found


def loss_of(kill: int | None, results: dict[int, Any]) -> dict[str, Any] | None:
    """What the others say of the rank that was killed. Raises `RankFailed` where they differ, or miss another."""
    lost = {r for result in results.values() for call in result["calls"] for r in call.lost}
    if lost != (set() if kill is None else {kill}):
        raise RankFailed(f"ranks {sorted(lost)} were lost, and {kill} was killed")
    if kill is None:
        return None
    first = {min(call.step for call in result["calls"] if call.lost) for result in results.values()}
    if len(first) != 1:
        raise RankFailed(f"rank {kill} was lost in step {sorted(first)}, as different ranks say")
    dropped = sum(call.dropped for result in results.values() for call in result["calls"])
    return {"rank": kill, "step": first.pop(), "dropped": dropped, "reports": [r["lost"][kill] for r in results.values()]}


def make_job(args: argparse.Namespace) -> dict[str, Any]:
    """Prompts of different number and length for each rank, and different numbers of tokens to add."""
    generator = torch.Generator().manual_seed(1)

    def prompt(length: int) -> list[int]:
        return [int(word) for word in torch.randint(2, MASK, (length,), generator=generator)]

    prompts = [[prompt(9 + 11 * ((rank + i) % 4)) for i in range(1 + (2 * rank + 1) % 4)] for rank in range(args.ranks)]
    new = [max(1, args.tokens - 2 * rank) for rank in range(args.ranks)]
    if args.mode == "blocks":
        new = [BLOCK * (-(-args.tokens // BLOCK) + rank % 2) for rank in range(args.ranks)]
    widest = max(len(some) * max(BLOCK, *map(len, some)) for some in prompts)
    return {"mode": args.mode, "prompts": prompts, "new": new, "max_tokens": widest, "kill": args.kill, "spoil": args.spoil}


def main() -> int:
    """0 when everything is equal."""
    parser = argparse.ArgumentParser(description="Qwen3-MoE with its experts on several ranks.")
    parser.add_argument("--mode", choices=list(MODES), default="generate")
    parser.add_argument("--ranks", type=int, default=4, choices=[1, 2, 4, 8])
    parser.add_argument("--tokens", type=int, default=16, help="to add to each sequence of rank 0 (default 16)")
    parser.add_argument("--kill", type=int, metavar="RANK", help="this rank is killed in the middle")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--spoil", type=int, help=argparse.SUPPRESS)  # this rank's results are wrong
    args = parser.parse_args()
    if not 1 <= args.tokens <= 500:
        parser.error(f"--tokens must lie in 1 to 500, not {args.tokens}")
    if args.kill is not None and (args.ranks == 1 or not 0 <= args.kill < args.ranks):
        parser.error(f"--kill names one of several ranks, not {args.kill} of {args.ranks}")
    job = make_job(args)
    say: Callable[..., None] = (lambda *_: None) if args.json else print
    say(f"{args.ranks} ranks with {EXPERTS // args.ranks} of {EXPERTS} experts each, {LAYERS} layers, mode {args.mode}")
    try:
        with World(args.ranks, job) as world:
            results = world.run()
            loss = loss_of(args.kill, results)
    except RankFailed as error:
        print(error, file=sys.stderr)
        return 1
    for rank, result in sorted(results.items()):
        sizes = ", ".join(str(len(prompt)) for prompt in job["prompts"][rank])
        say(f"rank {rank}: prompts of {sizes} tokens, {job['new'][rank]} more each; {result['idle']} passes without tokens")
    paths = sorted({path for result in results.values() for path in result["paths"]})
    say(f"paths between ranks: {', '.join(paths) or 'none'}")
    if loss is not None:
        say("\n".join(loss["reports"]))
        say(f"rank {loss['rank']} was lost in step {loss['step']}; {loss['dropped']:,} choices dropped")
    figures = layers(results)
    say("\nlayer  dispatch   combine   tokens sent  results sent   (medians; bytes between all ranks, of one pass)")
    for layer, one in enumerate(figures):
        times = f"{one['dispatch_ms']:6.2f} ms {one['combine_ms']:6.2f} ms"
        say(f"{layer:5} {times} {one['dispatch_bytes']:13,.0f} {one['combine_bytes']:13,.0f}")
    outcome = compare(job, results, loss)
    if args.json:
        tokens = {rank: result["tokens"] for rank, result in sorted(results.items())}
        idle = {rank: result["idle"] for rank, result in sorted(results.items())}
        more = {"mode": args.mode, "paths": paths, "layers": figures, "loss": loss, "idle": idle, "tokens": tokens}
        print(json.dumps(more | outcome))
    else:
        print(f"logits equal: {'yes' if outcome['logits_equal'] else 'no'} (max difference {outcome['logits_difference']:.1e})")
        print(f"tokens equal: {'yes' if outcome['tokens_equal'] else 'no'}" + (", without its experts" if loss else ""))
    return 0 if outcome["logits_equal"] and outcome["tokens_equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
