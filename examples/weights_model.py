"""The model of `weights_fsdp.py` as its trainers have it, and as its tensor-parallel inference ranks have it."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import embedding, linear, rms_norm, scaled_dot_product_attention, silu

from aiotransfer.weights import Fuse, Layout, Rename, Tensor, replicated, sharded

SERVERS = 2  # inference ranks
PROMPT, LENGTH = 8, 48  # words: that the inference side is asked to go on from, and of what a trainer learns


class Shape(NamedTuple):
    """The size of a model."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    inner: int
    words: int  # a prime number: no number of ranks divides the vocabulary


FULL = Shape(layers=7, hidden=512, heads=8, kv_heads=2, inner=1408, words=4099)
TINY = Shape(layers=2, hidden=64, heads=4, kv_heads=2, inner=96, words=509)
EPS = 1e-6

# ---- the text ----


class Text:
    """Words of Python's help as numbers; 0 stands for words that are too rare."""

    def __init__(self, words: int) -> None:
        found = re.findall(r"\w+|[^\w\s]", " ".join(topics[name] for name in sorted(topics)))
        common = sorted(Counter(found).items(), key=lambda item: (-item[1], item[0]))[: words - 1]
        self.words = ["?", *(word for word, _ in common)]
        number = {word: k for k, word in enumerate(self.words)}
        self.numbers = torch.tensor([number.get(word, 0) for word in found])

    def batch(self, rank: int, sequences: int = 2) -> torch.Tensor:
        """What a trainer rank learns."""
        begin = 5000 + rank * sequences * (LENGTH + 1)
        return self.numbers[begin : begin + sequences * (LENGTH + 1)].reshape(sequences, -1)

    def prompt(self) -> torch.Tensor:
        """The first words of what rank 0 learns."""
        return self.batch(0)[:1, :PROMPT]

    def read(self, numbers: Iterable[int]) -> str:
        return " ".join(self.words[k] if k < len(self.words) else "?" for k in numbers)


# ---- the model, as the trainers have it ----


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions; x is (batch, heads, positions, size)."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] * 10000.0 ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, size: int) -> torch.Tensor:
    """Causal attention with grouped heads of `size`, as many as there are columns."""
    q, k, v = (x.unflatten(-1, (-1, size)).transpose(1, 2) for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    k, v = rotate(k).repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return scaled_dot_product_attention(rotate(q), k, v, is_causal=True).transpose(1, 2).flatten(2)


class Layer(nn.Module):
    """Attention and a gated MLP."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        hidden, self.size = shape.hidden, shape.hidden // shape.heads
        self.norm1, self.norm2 = nn.RMSNorm(hidden, EPS), nn.RMSNorm(hidden, EPS)
        self.q, self.o = (nn.Linear(hidden, hidden, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(hidden, shape.kv_heads * self.size, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(hidden, shape.inner, bias=False) for _ in range(2))
        self.down = nn.Linear(shape.inner, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        x = x + self.o(attend(self.q(y), self.k(y), self.v(y), self.size))
        y = self.norm2(x)
        down: torch.Tensor = self.down(silu(self.gate(y)) * self.up(y))
        return x + down


class Model(nn.Module):
    """A transformer; its head is its embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.words, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, EPS)
        self.head = nn.Linear(shape.hidden, shape.words, bias=False)
        self.head.weight = self.embed.weight
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


# ---- the same weights, as the inference ranks have them ----

RULES = (
    Fuse(("layers.{i}.q.weight", "layers.{i}.k.weight", "layers.{i}.v.weight"), "layers.{i}.qkv", ranks=SERVERS, units=(2, 2, 2)),
    Fuse(("layers.{i}.gate.weight", "layers.{i}.up.weight"), "layers.{i}.gate_up", ranks=SERVERS),
    *(Rename(f"layers.{{i}}.{name}.weight", f"layers.{{i}}.{name}") for name in ("norm1", "norm2", "o", "down")),
)


def inference_layout(shape: Shape) -> Layout:
    """Of both ranks: rows of qkv, gate_up and the embedding, columns of o and down, all of the norms."""
    hidden, kv = shape.hidden, shape.hidden // shape.heads * shape.kv_heads
    tensors = {
        Tensor("embed.weight", (shape.words, hidden), "float32", aliases=("head.weight",)): 0,
        Tensor("norm.weight", (hidden,), "float32"): None,
    }
    for i in range(shape.layers):
        tensors |= {
            Tensor(f"layers.{i}.qkv", (hidden + 2 * kv, hidden), "float32"): 0,
            Tensor(f"layers.{i}.o", (hidden, hidden), "float32"): 1,
            Tensor(f"layers.{i}.gate_up", (2 * shape.inner, hidden), "float32"): 0,
            Tensor(f"layers.{i}.down", (hidden, shape.inner), "float32"): 1,
            Tensor(f"layers.{i}.norm1", (hidden,), "float32"): None,
            Tensor(f"layers.{i}.norm2", (hidden,), "float32"): None,
        }
    ranks = range(SERVERS)
    pieces = [sharded(t, ranks, dim) if dim is not None else replicated(t, ranks) for t, dim in tensors.items()]
    return Layout(list(tensors), [piece for some in pieces for piece in some], ranks=SERVERS)


def expected(whole: Mapping[str, torch.Tensor], shape: Shape, rank: int) -> dict[str, torch.Tensor]:
    """What an inference rank has to hold, cut in torch from the trainers' whole tensors: nothing of aiotransfer is used here."""

    def part(name: str, dim: int = 0) -> torch.Tensor:
        return whole[name].chunk(SERVERS, dim)[rank]

    found = {"embed.weight": part("embed.weight"), "norm.weight": whole["norm.weight"]}
    for i in range(shape.layers):
        one = f"layers.{i}."
        found[one + "qkv"] = torch.cat([part(f"{one}{name}.weight") for name in "qkv"])
        found[one + "gate_up"] = torch.cat([part(f"{one}{name}.weight") for name in ("gate", "up")])
        found |= {one + name: part(f"{one}{name}.weight", 1) for name in ("o", "down")}
        found |= {one + name: whole[f"{one}{name}.weight"] for name in ("norm1", "norm2")}
    return found


def digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """A digest of the bytes of each tensor."""
    return {name: hashlib.sha256(t.contiguous().numpy().data).hexdigest() for name, t in sorted(tensors.items())}


def infer(tensors: Mapping[str, torch.Tensor], shape: Shape, rank: int, group: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of all words. Both ranks compute their parts; sums go over the `group`."""

    def summed(x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x, group=group)
        return x

    step, size, hidden = -(-shape.words // SERVERS), shape.hidden // shape.heads, (shape.hidden,)
    embed = tensors["embed.weight"]
    local = ids - rank * step
    mine = (local >= 0) & (local < len(embed))
    x = summed(embedding(local.where(mine, torch.tensor(0)), embed) * mine[..., None])
    for i in range(shape.layers):
        layer = {name: tensors[f"layers.{i}.{name}"] for name in ("qkv", "o", "gate_up", "down", "norm1", "norm2")}
        qkv = linear(rms_norm(x, hidden, layer["norm1"], EPS), layer["qkv"])
        columns = [size * heads // SERVERS for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
        x = x + summed(linear(attend(*qkv.split(columns, -1), size), layer["o"]))
        gate, up = linear(rms_norm(x, hidden, layer["norm2"], EPS), layer["gate_up"]).chunk(2, -1)
        x = x + summed(linear(silu(gate) * up, layer["down"]))
    logits = torch.zeros(*ids.shape, shape.words)
    logits[..., rank * step : rank * step + len(embed)] = linear(rms_norm(x, hidden, tensors["norm.weight"], EPS), embed)
    return summed(logits)  # every word is one rank's: the sums are exact


def whole_of(shape: Shape) -> dict[str, torch.Tensor]:
    """Names and shapes of the trainers' model, without memory."""
    with torch.device("meta"):
        return dict(Model(shape).state_dict())
