"""New weights for a mixture of experts: FSDP2 trainers push into expert-parallel inference ranks, whose replicas move.

    python examples/weights_moe.py            # three trainers, two inference ranks; some seconds
    python examples/weights_moe.py --steps 9  # more training before each version

The model is a small Qwen3-MoE with random weights, named as its checkpoints are. Three trainers shard every parameter over all
of them, unevenly, with `fully_shard` over gloo. Each of the two inference ranks holds its share of the experts of every layer in
the slots of one stack, with gate and up in one tensor, and q, k, v in one tensor, as inference engines do. The most used experts
have a slot on both ranks: which these are is counted, and after the second version the slots are dealt anew. Nothing but the
layout of the inference side changes then: experts are known by their logical number, and the next version reaches every slot.

After each version the bits of every slot and tensor are compared with what `full_tensor()` gives at the trainers, and the logits
of both sides. The program ends with status 1 when anything is not as it should be.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import tempfile
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy, embedding, linear, rms_norm, silu
from weights_fsdp import DEADLINE, Failed, Ranks, open_group
from weights_model import EPS, Text, attend, digests

import aiotransfer as at
from aiotransfer import weights
from aiotransfer.weights import Fuse, Layout, Piece, Rename, Stack, Tensor, placed, replicated

TRAINERS, SERVERS = 3, 2
LAYERS, HIDDEN, HEADS, KV_HEADS, SIZE, WORDS = 2, 64, 4, 2, 16, 509
EXPERTS, CHOSEN, INNER = 8, 2, 40
COPIES = 4  # experts of each layer that have a second slot
VERSIONS, MOVED = 4, 3  # how many are published; before which the slots are dealt anew
TOLERANCE = 1e-5  # of logits, relative to the largest
Slots: TypeAlias = list[list[list[int]]]  # of each layer and inference rank: the expert in each slot

# ---- the model ----


def attention(x: torch.Tensor, norm: torch.Tensor, qkv: Any, q_norm: torch.Tensor, k_norm: torch.Tensor, o: torch.Tensor) -> Any:
    """`qkv`: what makes queries, keys and values of its argument."""
    q, k, v = qkv(rms_norm(x, (HIDDEN,), norm, EPS))
    q, k = (rms_norm(y.unflatten(-1, (-1, SIZE)), (SIZE,), n, EPS).flatten(-2) for y, n in ((q, q_norm), (k, k_norm)))
    return x + linear(attend(q, k, v, SIZE), o)


def route(x: torch.Tensor, router: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of each token, and how much each counts."""
    values, experts = linear(x, router).softmax(-1).topk(CHOSEN, -1)
    return experts, values / values.sum(-1, keepdim=True)


def expert(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    gate, up = linear(x, gate_up).chunk(2, -1)
    return linear(silu(gate) * up, down)


def linears(**shapes: tuple[int, int]) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(columns, rows, bias=False) for name, (rows, columns) in shapes.items()})


class Layer(nn.Module):
    """As the trainers have it."""

    def __init__(self) -> None:
        super().__init__()
        q, kv = HEADS * SIZE, KV_HEADS * SIZE
        self.self_attn = linears(q_proj=(q, HIDDEN), k_proj=(kv, HIDDEN), v_proj=(kv, HIDDEN), o_proj=(HIDDEN, q))
        self.self_attn.update({name: nn.RMSNorm(SIZE, EPS) for name in ("q_norm", "k_norm")})
        some = [linears(gate_proj=(INNER, HIDDEN), up_proj=(INNER, HIDDEN), down_proj=(HIDDEN, INNER)) for _ in range(EXPERTS)]
        self.mlp = linears(gate=(EXPERTS, HIDDEN))
        self.mlp["experts"] = nn.ModuleList(some)
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(HIDDEN, EPS), nn.RMSNorm(HIDDEN, EPS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = {name: module.weight for name, module in self.self_attn.items()}
        x = attention(
            x, self.input_layernorm.weight, lambda y: [linear(y, a[f"{n}_proj"]) for n in "qkv"], a["q_norm"], a["k_norm"],
            a["o_proj"],
        )  # fmt: skip
        y = rms_norm(x, (HIDDEN,), self.post_attention_layernorm.weight, EPS).flatten(0, 1)
        experts, amounts = route(y, self.mlp["gate"].weight)
        each = torch.zeros(len(y), EXPERTS).scatter(1, experts, amounts)
        for e, one in enumerate(self.mlp["experts"]):  # every token through every expert: so every rank has every gradient
            gate_up = torch.cat([one["gate_proj"].weight, one["up_proj"].weight])
            x = x + (each[:, e, None] * expert(y, gate_up, one["down_proj"].weight)).reshape(x.shape)
        return x


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(WORDS, HIDDEN), "norm": nn.RMSNorm(HIDDEN, EPS)})
        self.model["layers"] = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.lm_head = nn.Linear(HIDDEN, WORDS, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.05)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.model["embed_tokens"](ids)
        for layer in self.model["layers"]:
            x = layer(x)
        logits: torch.Tensor = self.lm_head(self.model["norm"](x))
        return logits


# ---- the same weights, as the inference ranks have them ----

ONE, EXPERT = "model.layers.{i}.", "model.layers.{i}.mlp.experts.{e}."
RENAMED = {
    "norm1": "input_layernorm", "norm2": "post_attention_layernorm", "o": "self_attn.o_proj", "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm", "router": "mlp.gate",
}  # fmt: skip
RULES = (
    Fuse(tuple(f"{ONE}self_attn.{n}_proj.weight" for n in "qkv"), "layers.{i}.qkv"),
    Stack((f"{EXPERT}gate_proj.weight", f"{EXPERT}up_proj.weight"), "layers.{i}.gate_up", index="e"),
    Stack(f"{EXPERT}down_proj.weight", "layers.{i}.down", index="e"),
    *(Rename(f"{ONE}{theirs}.weight", f"layers.{{i}}.{ours}") for ours, theirs in RENAMED.items()),
    *(Rename(f"{name}.weight", name.rpartition(".")[2]) for name in ("model.embed_tokens", "model.norm", "lm_head")),
)


def inference_layout(slots: Slots) -> Layout:
    """Of both ranks: experts in their slots, everything else on both."""
    everywhere: dict[str, tuple[int, ...]] = {"embed_tokens": (WORDS, HIDDEN), "norm": (HIDDEN,), "lm_head": (WORDS, HIDDEN)}
    tensors: list[Tensor] = []
    pieces: list[Piece] = []
    for i, by_rank in enumerate(slots):
        shapes = {
            "qkv": ((HEADS + 2 * KV_HEADS) * SIZE, HIDDEN), "o": (HIDDEN, HEADS * SIZE), "q_norm": (SIZE,), "k_norm": (SIZE,),
            "norm1": (HIDDEN,), "norm2": (HIDDEN,), "router": (EXPERTS, HIDDEN),
        }  # fmt: skip
        everywhere |= {f"layers.{i}.{name}": shape for name, shape in shapes.items()}
        for name, shape in (("gate_up", (EXPERTS, 2 * INNER, HIDDEN)), ("down", (EXPERTS, HIDDEN, INNER))):
            tensors.append(Tensor(f"layers.{i}.{name}", shape, "float32", "experts"))
            pieces += placed(tensors[-1], dict(enumerate(by_rank)))
    for name, shape in everywhere.items():
        tensors.append(Tensor(name, shape, "float32"))
        pieces += replicated(tensors[-1], range(SERVERS))
    return Layout(tensors, pieces, ranks=SERVERS)


def dealt(used: list[list[int]]) -> Slots:
    """Every expert of a layer in a slot, in turn over the ranks; those used most in one of another rank, too."""
    slots = []
    for counts in used:
        order = sorted(range(EXPERTS), key=lambda e: (-counts[e], e))
        ranks: list[list[int]] = [[] for _ in range(SERVERS)]
        for turn, e in enumerate([*order, *order[:COPIES]]):
            ranks[(turn + turn // EXPERTS) % SERVERS].append(e)
        slots.append(ranks)
    return slots


def infer(tensors: Mapping[str, Any], slots: Slots, rank: int, ids: torch.Tensor) -> tuple[torch.Tensor, list[list[int]]]:
    """Logits, and how often each expert of each layer was chosen. A token goes to one of an expert's slots, by its position."""
    x, used = embedding(ids, tensors["embed_tokens"]), []
    columns = [HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE]
    for i, by_rank in enumerate(slots):
        layer = {name: tensors[f"layers.{i}.{name}"] for name in ("qkv", "gate_up", "down", *RENAMED)}
        qkv = layer["qkv"]
        x = attention(
            x, layer["norm1"], lambda y, qkv=qkv: linear(y, qkv).split(columns, -1), layer["q_norm"], layer["k_norm"], layer["o"]
        )
        y = rms_norm(x, (HIDDEN,), layer["norm2"], EPS).flatten(0, 1)
        experts, amounts = route(y, layer["router"])
        used.append(torch.bincount(experts.flatten(), minlength=EXPERTS).tolist())
        holders = [[(r, s) for r, some in enumerate(by_rank) for s, held in enumerate(some) if held == e] for e in range(EXPERTS)]
        out = torch.zeros_like(y)
        for slot, e in enumerate(by_rank[rank]):
            token, choice = (experts == e).nonzero(as_tuple=True)
            mine = token % len(holders[e]) == holders[e].index((rank, slot))
            token, choice = token[mine], choice[mine]
            result = expert(y[token], layer["gate_up"][slot][0], layer["down"][slot][0])
            out.index_add_(0, token, amounts[token, choice, None] * result)
        dist.all_reduce(out)
        x = x + out.reshape(x.shape)
    return linear(rms_norm(x, (HIDDEN,), tensors["norm"], EPS), tensors["lm_head"]), used


# ---- the roles ----


def trainer_main(rank: int, job: dict[str, Any], main: Connection) -> None:
    """A trainer process: with each number that comes it trains and publishes."""
    torch.set_num_threads(1)
    open_group(job["folder"] + "/trainers", rank, TRAINERS)
    torch.manual_seed(0)
    model: Any = Model()
    mesh = dist.init_device_mesh("cpu", (TRAINERS,))
    for part in (*model.model["layers"], model):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    optimizer, text = torch.optim.AdamW(model.parameters(), lr=3e-3), Text(WORDS)

    def loss() -> torch.Tensor:
        batch = text.batch(rank)
        return cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten(), ignore_index=0)

    async def role() -> weights.Publisher:
        return weights.Publisher(thread.engine, weights.layout_of(model), group=thread.engine.group(addresses), rules=RULES)

    async def publish(number: int) -> None:
        async with publisher.publish(number):
            pass

    with at.run_in_thread(name=f"trainer {rank}", timeout=DEADLINE / 2) as thread:
        main.send(str(thread.engine.address))
        addresses = main.recv()
        publisher = thread.run(role())
        while (number := main.recv()) is not None:
            for _ in range(job["steps"] if number > 1 else 0):
                optimizer.zero_grad()
                loss().backward()
                optimizer.step()
            with torch.no_grad():
                mean, logits = loss() / TRAINERS, model(text.batch(0)[:1])
                dist.all_reduce(mean)
                whole = {name: thing.full_tensor() for name, thing in model.state_dict().items()}
            began = time.perf_counter()
            thread.run(publish(number))
            said = {"loss": float(mean), "seconds": time.perf_counter() - began}
            main.send(said | ({} if rank else {"logits": logits.numpy(), "digests": expected(whole)}))
        thread.run(publisher.aclose())
    dist.destroy_process_group()


def expected(whole: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Of every tensor and every single expert, made in torch alone of the trainers' whole tensors."""
    found = {name.rpartition(".")[2]: whole[f"{name}.weight"] for name in ("model.embed_tokens", "model.norm", "lm_head")}
    for i in range(LAYERS):
        one = ONE.format(i=i)
        found[f"layers.{i}.qkv"] = torch.cat([whole[f"{one}self_attn.{n}_proj.weight"] for n in "qkv"])
        found |= {f"layers.{i}.{ours}": whole[f"{one}{theirs}.weight"] for ours, theirs in RENAMED.items()}
        for e in range(EXPERTS):
            gate, up, down = (whole[f"{EXPERT.format(i=i, e=e)}{n}_proj.weight"] for n in ("gate", "up", "down"))
            found |= {f"layers.{i}.gate_up of expert {e}": torch.cat([gate, up]), f"layers.{i}.down of expert {e}": down}
    return digests(found)


def server_main(rank: int, job: dict[str, Any], main: Connection) -> None:
    """An inference process: it takes new slots, or answers."""
    torch.set_num_threads(1)
    open_group(job["folder"] + "/servers", rank, SERVERS)
    prompt = Text(WORDS).batch(0)[:1]

    async def subscribe(slots: Slots) -> weights.Subscriber:
        layout = inference_layout(slots)
        memory = {name: torch.zeros(n, dtype=torch.uint8) for name, n in layout.buffers_of(rank).items()}
        return weights.Subscriber(thread.engine, layout.bind(rank, memory), instance="chat")

    async def answer() -> dict[str, Any]:
        async with subscriber.reading() as version:
            return {"version": str(version), **await asyncio.to_thread(compute, subscriber.tensors)}

    @torch.no_grad()
    def compute(tensors: Mapping[str, Any]) -> dict[str, Any]:
        if job["spoil"] and rank == 1:
            tensors["layers.1.gate_up"][-1][0, 3, 3] += 1
        logits, used = infer(tensors, slots, rank, prompt)
        found = {name: thing for name, thing in tensors.items() if not isinstance(thing, tuple)}
        held = {
            f"{name} of expert {slots[int(name.split('.')[1])][rank][slot]} in slot {slot}": view[0]
            for name, views in tensors.items() if isinstance(views, tuple) for slot, view in enumerate(views)
        }  # fmt: skip
        return {"logits": logits.numpy(), "used": used, "digests": digests(found | held)}

    with at.run_in_thread(name=f"inference {rank}", timeout=DEADLINE / 2) as thread:
        thread.run(thread.engine.connect(job["leader"]))
        slots: Slots = main.recv()
        subscriber = thread.run(subscribe(slots))
        main.send(None)
        while (order := main.recv()) is not None:
            if order == "answer":
                main.send(thread.run(answer()))
            else:
                thread.run(subscriber.aclose())
                slots = order
                subscriber = thread.run(subscribe(slots))
                main.send(subscriber.version)
        thread.run(subscriber.aclose())
    dist.destroy_process_group()


# ---- the main process ----


def compare(trained: Any, answers: list[Any], number: int) -> tuple[list[str], float]:
    """What differs between the sides, and the largest relative difference of logits."""
    unequal, worst = [], 0.0
    reference = torch.from_numpy(trained["logits"])
    for rank, answer in enumerate(answers):
        wanted = trained["digests"]
        missing = wanted.keys() - {name.partition(" in slot")[0] for one in answers for name in one["digests"]}
        unequal += [f"version {number}: no rank has {name}" for name in sorted(missing)]
        for name, digest in answer["digests"].items():
            if wanted.get(name.partition(" in slot")[0]) != digest:
                unequal.append(f"version {answer['version']}, rank {rank}: {name}")
        if not answer["version"].endswith(f".{number}"):
            unequal.append(f"rank {rank} has version {answer['version']}, not {number}")
        difference = float((torch.from_numpy(answer["logits"]) - reference).abs().max() / reference.abs().max())
        worst = max(worst, difference if math.isfinite(difference) else math.inf)
    return unequal, worst


def demonstrate(job: dict[str, Any], say: Any) -> dict[str, Any]:
    """All versions. Raises `Failed`."""
    losses, unequal, worst, moved, slots = [], [], 0.0, 0, dealt([[0] * EXPERTS] * LAYERS)
    answers: list[Any] = []
    with Ranks(trainer_main, TRAINERS, job) as trainers:
        addresses = [trainers.hear(rank) for rank in range(TRAINERS)]
        for pipe in trainers.pipes.values():
            pipe.send(addresses)
        with Ranks(server_main, SERVERS, job | {"leader": addresses[0]}) as servers:
            servers.ask(slots)
            for number in range(1, VERSIONS + 1):
                if number == MOVED:
                    before, slots = slots, dealt(answers[0]["used"])
                    moved = sum(a != b for x, y in zip(before, slots, strict=True) for p, q in zip(x, y, strict=True)
                                for a, b in zip(p, q, strict=True))  # fmt: skip
                    if servers.ask(slots) != [None] * SERVERS:
                        raise Failed("a rank with new slots has a version before one has come")
                    say(f"{moved} of {LAYERS * (EXPERTS + COPIES)} slots hold another expert from here on: {slots}")
                trained = trainers.ask(number)[0]
                answers = servers.ask("answer")
                differs, difference = compare(trained, answers, number)
                unequal, worst = unequal + differs, max(worst, difference)
                losses.append(trained["loss"])
                say(f"version {answers[0]['version']}: loss {losses[-1]:.3f}, published {1e3 * trained['seconds']:.0f} ms; "
                    f"experts chosen: {answers[0]['used']}")  # fmt: skip
                if differs:
                    break
    return {
        "losses": losses, "loss_falls": losses[-1] < losses[0], "moved": moved, "slots": slots, "unequal": unequal,
        "logits_difference": worst, "logits_equal": worst <= TOLERANCE, "weights_equal": not unequal,
    }  # fmt: skip


def main() -> int:
    """0 when everything is equal."""
    parser = argparse.ArgumentParser(description="FSDP2 trainers push new weights into expert-parallel inference ranks.")
    parser.add_argument("--steps", type=int, default=3, help="of training before each version but the first (default 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--spoil", action="store_true", help=argparse.SUPPRESS)  # a replica of an expert holds a wrong number
    args = parser.parse_args()
    if not 1 <= args.steps <= 1000:
        parser.error(f"--steps must lie in 1 to 1000, not {args.steps}")
    try:
        with tempfile.TemporaryDirectory() as folder:
            job = {"folder": folder, "steps": args.steps, "spoil": args.spoil}
            outcome = demonstrate(job, (lambda _: None) if args.json else lambda text: print(text, flush=True))
    except Failed as error:
        print(error, file=sys.stderr)
        return 1
    for text in outcome["unequal"]:
        print(text, file=sys.stderr)
    words = {name: "yes" if outcome[name] else "no" for name in ("loss_falls", "logits_equal", "weights_equal")}
    if args.json:
        print(json.dumps(outcome))
    else:
        print(f"loss falls: {words['loss_falls']} ({outcome['losses'][0]:.3f} to {outcome['losses'][-1]:.3f})")
        print(f"logits equal: {words['logits_equal']} (largest relative difference {outcome['logits_difference']:.1e})")
        print(f"weights equal: {words['weights_equal']}")
    return 0 if all(word == "yes" for word in words.values()) and outcome["moved"] else 1


if __name__ == "__main__":
    sys.exit(main())
