"""The smallest GGUF files with experts that a server of llama.cpp can talk with."""

from __future__ import annotations

from pathlib import Path

import transformers

from flashmoe.engines.transformers.checkpoints.random_weights import RandomWeights
from harness.runs import gguf_file

EXPERTS, TOP_K, LAYERS = 16, 4, 4
_SETTINGS = dict(
    hidden_size=256, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=4,
    num_experts=EXPERTS, num_experts_per_tok=TOP_K, vocab_size=512, max_position_embeddings=2048,
    eos_token_id=511,
)  # fmt: skip
_FAMILIES = {
    "olmoe": dict(num_key_value_heads=4),
    "qwen3_moe": dict(num_key_value_heads=2, moe_intermediate_size=128, head_dim=64),
}


def write(path: Path, family: str = "olmoe", scheme: str = "int4", **settings: int) -> Path:
    """A random model of this family in `path`, always the same; settings: of its configuration.

    Raises FlashMoEError for a family or a scheme that has no counterpart.
    """
    chosen = _SETTINGS | _FAMILIES[family] | settings
    config = transformers.AutoConfig.for_model(family, **chosen)
    gguf_file.write(RandomWeights(config, 0), path, scheme)
    return path
