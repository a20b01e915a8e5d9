"""A GGUF file with experts that is quick to serve: OLMoE's kind, random weights."""

from __future__ import annotations

from pathlib import Path

import transformers

from flashmoe.engines.transformers.checkpoints.random_weights import RandomWeights
from harness.runs import gguf_file

MEMORY = "3MiB"  # a quarter of the experts: they are read again and again


def write(path: Path) -> None:
    config = transformers.OlmoeConfig(
        vocab_size=512, hidden_size=128, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, num_experts=16, num_experts_per_tok=2,
        max_position_embeddings=4096, eos_token_id=511, pad_token_id=0,
    )  # fmt: skip
    gguf_file.write(RandomWeights(config, 0), path)
