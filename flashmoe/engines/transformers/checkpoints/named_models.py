"""The models that `flashmoe synth` knows by name: their published configurations and sizes."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from flashmoe.engines.transformers.model import empty_model
from flashmoe.errors import FlashMoEError

# The published config.json of each model, as far as it differs from transformers' defaults.
MODELS: dict[str, dict[str, Any]] = {
    "olmoe-1b-7b": {  # allenai/OLMoE-1B-7B-0924
        "model_type": "olmoe",
        "architectures": ["OlmoeForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "vocab_size": 50304,
        "max_position_embeddings": 4096,
    },
    "deepseek-v2-lite": {  # deepseek-ai/DeepSeek-V2-Lite
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "n_shared_experts": 2,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "vocab_size": 102400,
        "max_position_embeddings": 4096,
    },
    "gpt-oss-20b": {  # openai/gpt-oss-20b, its MXFP4 experts as bf16
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "vocab_size": 201088,
        "max_position_embeddings": 4096,
    },
    "qwen3-30b-a3b": {  # Qwen/Qwen3-30B-A3B
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "vocab_size": 151936,
        "max_position_embeddings": 4096,
    },
    "mixtral-8x7b": {  # mistralai/Mixtral-8x7B-v0.1
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
}
# OLMoE at half the width, whose experts are a quarter of the size: for tables in minutes.
MODELS["olmoe-quarter"] = MODELS["olmoe-1b-7b"] | {"hidden_size": 1024, "intermediate_size": 512}
DTYPE_OPTIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def config_of(name: str, dtype: str = "bf16") -> transformers.PretrainedConfig:
    """A named model's configuration; dtype: a key of DTYPE_OPTIONS.

    Raises FlashMoEError for an unknown name.
    """
    if name not in MODELS:
        raise FlashMoEError(f"no model is called {name!r}: choose from {', '.join(MODELS)}")
    settings = MODELS[name] | {"dtype": str(DTYPE_OPTIONS[dtype]).removeprefix("torch.")}
    config: transformers.PretrainedConfig = transformers.AutoConfig.for_model(**settings)
    config.architectures = settings["architectures"]
    return config


def total_bytes(name: str, dtype: str = "bf16") -> int:
    """Bytes of all weights of a named model. Raises FlashMoEError for an unknown name."""
    model = empty_model.build(config_of(name, dtype))
    return sum(p.numel() for p in model.parameters()) * DTYPE_OPTIONS[dtype].itemsize
