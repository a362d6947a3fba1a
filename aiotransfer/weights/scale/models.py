"""Large public models by their configurations alone: which tensors they have. Pure.

Names are those of the public checkpoints, which hold each expert's projections as tensors of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

BLOCK = 128  # rows and columns that share a scale


@dataclass(frozen=True, slots=True)
class Model:
    """A mixture-of-experts transformer; the fields are those of its public `config.json`.

    `hidden`, `layers`, `vocab`; `dense_layers`: the first layers, which have no experts but an MLP of
    `intermediate`; `experts`, `shared_experts`, `expert_intermediate`; `heads`, `kv_heads`, `head_dim`
    (grouped heads), or, where `kv_lora` is not 0, latent attention (MLA): `q_lora`, `kv_lora`, `nope`,
    `rope`, `v_dim`. `router_bias`: the router has a bias for each expert; `qk_norm`: queries and keys have
    norms of their own; `tied`: `lm_head` is the embedding. `parameters`: what its publisher says, in units;
    `source`: where all this stands.
    """

    name: str
    hidden: int
    layers: int
    vocab: int
    experts: int
    expert_intermediate: int
    heads: int
    parameters: float
    source: str
    dense_layers: int = 0
    intermediate: int = 0
    shared_experts: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    q_lora: int = 0
    kv_lora: int = 0
    nope: int = 0
    rope: int = 0
    v_dim: int = 0
    router_bias: bool = False
    qk_norm: bool = False
    tied: bool = False

    def cut(self, layers: int | None = None, experts: int | None = None) -> Model:
        """The same model with fewer layers or experts. Raises `ValueError` for more than it has, or none."""
        for what, asked, most in (("layers", layers, self.layers), ("experts", experts, self.experts)):
            if asked is not None and not 1 <= asked <= most:
                raise ValueError(f"{self.name} has {most} {what}; it cannot be cut to {asked}")
        fewer = self.layers if layers is None else layers
        return dataclasses.replace(
            self, layers=fewer, experts=self.experts if experts is None else experts,
            dense_layers=min(self.dense_layers, max(fewer - 1, 0)),
        )  # fmt: skip


MODELS = {
    model.name: model
    for model in (
        Model(
            "kimi-k2", hidden=7168, layers=61, vocab=163840, experts=384, expert_intermediate=2048, heads=64, dense_layers=1,
            intermediate=18432, shared_experts=1, q_lora=1536, kv_lora=512, nope=128, rope=64, v_dim=128, router_bias=True,
            parameters=1.0e12, source="huggingface.co/moonshotai/Kimi-K2-Instruct, config.json (model_type kimi_k2)",
        ),
        Model(
            "deepseek-v3", hidden=7168, layers=61, vocab=129280, experts=256, expert_intermediate=2048, heads=128,
            dense_layers=3, intermediate=18432, shared_experts=1, q_lora=1536, kv_lora=512, nope=128, rope=64, v_dim=128,
            router_bias=True, parameters=671e9,
            source="huggingface.co/deepseek-ai/DeepSeek-V3, config.json, and README_WEIGHTS.md there (without the MTP module)",
        ),
        Model(
            "qwen3-235b", hidden=4096, layers=94, vocab=151936, experts=128, expert_intermediate=1536, heads=64, kv_heads=4,
            head_dim=128, qk_norm=True, parameters=235e9, source="huggingface.co/Qwen/Qwen3-235B-A22B, config.json",
        ),
    )
}  # fmt: skip


class Weight(NamedTuple):
    """A tensor of a model, or, with `experts` > 0, one such tensor of each expert of a layer.

    `name` (`{e}` stands for the expert), `shape` (of one expert), `layer` (-1: before the first, `layers`:
    behind the last), `store`: the memory in which an inference rank keeps it together with those that have
    the same (fused projections, stacks of experts); `quantised`: fp8 with block scales at the inference side;
    `dtype`: at both sides, where it is not quantised.
    """

    name: str
    shape: tuple[int, ...]
    layer: int
    store: str
    quantised: bool = False
    experts: int = 0
    dtype: str = "bfloat16"

    @property
    def parameters(self) -> int:
        """How many elements it has, those of all experts together."""
        size = 1
        for n in self.shape:
            size *= n
        return size * max(self.experts, 1)


def weights(model: Model) -> Iterator[Weight]:
    """All tensors of a model, in the order of its layers."""
    yield Weight("model.embed_tokens.weight", (model.vocab, model.hidden), -1, "embed_tokens")
    for layer in range(model.layers):
        at = f"model.layers.{layer}"
        yield Weight(f"{at}.input_layernorm.weight", (model.hidden,), layer, f"{at}.norms")
        yield Weight(f"{at}.post_attention_layernorm.weight", (model.hidden,), layer, f"{at}.norms")
        yield from _latent(model, layer, f"{at}.self_attn") if model.kv_lora else _grouped(model, layer, f"{at}.self_attn")
        if layer < model.dense_layers:
            yield from _mlp(model, layer, f"{at}.mlp", model.intermediate)
        else:
            yield from _experts(model, layer, f"{at}.mlp")
    yield Weight("model.norm.weight", (model.hidden,), model.layers, "norm")
    if not model.tied:
        yield Weight("lm_head.weight", (model.vocab, model.hidden), model.layers, "lm_head")


def _latent(model: Model, layer: int, at: str) -> Iterator[Weight]:
    hidden, heads = model.hidden, model.heads
    yield Weight(f"{at}.q_a_proj.weight", (model.q_lora, hidden), layer, f"{at}.qkv_a", True)
    yield Weight(f"{at}.kv_a_proj_with_mqa.weight", (model.kv_lora + model.rope, hidden), layer, f"{at}.qkv_a", True)
    yield Weight(f"{at}.q_a_layernorm.weight", (model.q_lora,), layer, f"{at}.norms")
    yield Weight(f"{at}.kv_a_layernorm.weight", (model.kv_lora,), layer, f"{at}.norms")
    yield Weight(f"{at}.q_b_proj.weight", (heads * (model.nope + model.rope), model.q_lora), layer, f"{at}.q_b", True)
    yield Weight(f"{at}.kv_b_proj.weight", (heads * (model.nope + model.v_dim), model.kv_lora), layer, f"{at}.kv_b", True)
    yield Weight(f"{at}.o_proj.weight", (hidden, heads * model.v_dim), layer, f"{at}.o", True)


def _grouped(model: Model, layer: int, at: str) -> Iterator[Weight]:
    hidden, dim = model.hidden, model.head_dim
    for name, heads in (("q", model.heads), ("k", model.kv_heads), ("v", model.kv_heads)):
        yield Weight(f"{at}.{name}_proj.weight", (heads * dim, hidden), layer, f"{at}.qkv", True)
    if model.qk_norm:
        yield Weight(f"{at}.q_norm.weight", (dim,), layer, f"{at}.norms")
        yield Weight(f"{at}.k_norm.weight", (dim,), layer, f"{at}.norms")
    yield Weight(f"{at}.o_proj.weight", (hidden, model.heads * dim), layer, f"{at}.o", True)


def _mlp(model: Model, layer: int, at: str, size: int) -> Iterator[Weight]:
    yield Weight(f"{at}.gate_proj.weight", (size, model.hidden), layer, f"{at}.gate_up", True)
    yield Weight(f"{at}.up_proj.weight", (size, model.hidden), layer, f"{at}.gate_up", True)
    yield Weight(f"{at}.down_proj.weight", (model.hidden, size), layer, f"{at}.down", True)


def _experts(model: Model, layer: int, at: str) -> Iterator[Weight]:
    yield Weight(f"{at}.gate.weight", (model.experts, model.hidden), layer, f"{at}.router")
    if model.router_bias:
        yield Weight(f"{at}.gate.e_score_correction_bias", (model.experts,), layer, f"{at}.router.bias", dtype="float32")
    if model.shared_experts:
        yield from _mlp(model, layer, f"{at}.shared_experts", model.shared_experts * model.expert_intermediate)
    for weight in _mlp(model, layer, f"{at}.experts.{{e}}", model.expert_intermediate):
        yield weight._replace(experts=model.experts, store=weight.store.replace(".{e}", ""))
