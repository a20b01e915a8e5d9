"""Tiny models with random weights as GGUF files."""

from __future__ import annotations

from pathlib import Path

import transformers

from flashmoe.engines.transformers.checkpoints.random_weights import RandomWeights
from harness.runs import gguf_file

EXPERTS, TOP_K, LAYERS = 16, 4, 4
FAMILIES = {
    "olmoe": dict(num_experts=EXPERTS, num_key_value_heads=4),
    "qwen3_moe": dict(
        num_experts=EXPERTS, num_key_value_heads=2, moe_intermediate_size=128, head_dim=64
    ),
}


def write(path: Path, family: str = "olmoe", scheme: str = "int4") -> Path:
    """A model of 4 layers with 16 experts each, and a vocabulary of bytes."""
    config = transformers.AutoConfig.for_model(
        family, hidden_size=256, intermediate_size=128, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_experts_per_tok=TOP_K, vocab_size=512,
        max_position_embeddings=2048, **FAMILIES[family],
    )  # fmt: skip
    gguf_file.write(RandomWeights(config, 0), path, scheme)
    return path
