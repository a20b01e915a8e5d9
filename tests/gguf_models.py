"""Tiny models of the families that can be written as GGUF files."""

from __future__ import annotations

import transformers

from flashmoe.engines.transformers.checkpoints.random_weights import RandomWeights

EXPERTS, TOP_K, LAYERS = 16, 4, 4
_LATENT = dict(
    n_routed_experts=EXPERTS, n_shared_experts=1, first_k_dense_replace=1, q_lora_rank=64,
    kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32,
    moe_intermediate_size=256,
)  # fmt: skip
FAMILIES = {
    "olmoe": dict(num_experts=EXPERTS),
    "qwen3_moe": dict(
        num_experts=EXPERTS, num_key_value_heads=2, moe_intermediate_size=256, head_dim=64,
        norm_topk_prob=True,
    ),
    "qwen2_moe": dict(
        num_experts=EXPERTS, num_key_value_heads=2, moe_intermediate_size=256,
        shared_expert_intermediate_size=128,
    ),
    "gpt_oss": dict(num_local_experts=EXPERTS, num_key_value_heads=2, head_dim=64),
    "deepseek_v2": _LATENT | dict(n_group=1, topk_group=1),
    "deepseek_v3": _LATENT | dict(n_group=4, topk_group=2),
    "mixtral": dict(num_local_experts=8, num_key_value_heads=2),
    "granitemoe": dict(
        num_local_experts=EXPERTS, intermediate_size=128, embedding_multiplier=3.0,
        logits_scaling=2.0, residual_multiplier=0.5, attention_multiplier=0.1,
    ),
}  # fmt: skip


def weights(family: str, **settings: object) -> RandomWeights:
    """Rows of 256 weights, which every type of ggml can hold."""
    sizes = dict(
        hidden_size=256, intermediate_size=256, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_experts_per_tok=TOP_K, vocab_size=512, max_position_embeddings=2048, eos_token_id=511,
    )  # fmt: skip
    config = transformers.AutoConfig.for_model(family, **(sizes | FAMILIES[family] | settings))
    return RandomWeights(config, 0)
