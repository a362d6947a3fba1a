"""Tiny models with seeded random weights as folders that vLLM loads: a Llama of a million parameters, with numbers for words."""

from __future__ import annotations

import sys
from typing import Any

LAYERS, HIDDEN, WORDS = 2, 128, 1000


def build(seed: int, tied: bool = False) -> Any:
    """The model of a seed, in bfloat16. `tied`: its head is its embedding."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=HIDDEN, intermediate_size=256, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def with_more(seed: int, tied: bool) -> Any:
    """The same with a parameter that vLLM's model has not."""
    import torch

    model = build(seed, tied)
    model.model.layers[1].register_parameter("more", torch.nn.Parameter(torch.ones(3)))
    return model


def with_less(seed: int, tied: bool) -> Any:
    """The same without the keys of a layer, which vLLM's model has in one parameter with the queries and values."""
    model = build(seed, tied)
    del model.model.layers[0].self_attn.k_proj
    return model


def continued(model: Any, prompt: list[int], tokens: int) -> list[int]:
    """What the model says by itself, without vLLM."""
    import torch

    with torch.no_grad():
        ids = torch.tensor([prompt])
        for _ in range(tokens):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return [int(token) for token in ids[0, len(prompt) :]]


if __name__ == "__main__":
    build(int(sys.argv[2]), sys.argv[3:] == ["tied"]).save_pretrained(sys.argv[1])
