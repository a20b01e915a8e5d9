"""Tiny random models of several families, saved by transformers in its hub layout."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from baselines.in_memory import with_own_memory
from flashmoe.store import manifest

FAMILIES = {
    "olmoe": dict(num_experts=8, num_experts_per_tok=2),
    "mixtral": dict(num_local_experts=6, num_experts_per_tok=2),
    "qwen3_moe": dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=24, head_dim=16),
    "gpt_oss": dict(num_local_experts=8, num_experts_per_tok=2, head_dim=16),  # biased, transposed
    "deepseek_v2": dict(  # shared experts, a dense first layer
        n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=24, n_shared_experts=1,
        first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=None, qk_nope_head_dim=16,
        qk_rope_head_dim=8, v_head_dim=16, n_group=1, topk_group=1, topk_method="greedy",
    ),
}  # fmt: skip


SIZES = dict(
    vocab_size=128, hidden_size=32, intermediate_size=40, num_hidden_layers=3,
    num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=2048,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def make_checkpoint(
    family: str, folder: Path, dtype: torch.dtype | None = None, **sizes: int
) -> Path:
    """Save a random model of a family, in float32 if no dtype is named."""
    config = transformers.AutoConfig.for_model(family, **SIZES | FAMILIES[family] | sizes)
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype or torch.float32)
    with torch.no_grad():  # larger than the default spread, so that routing varies
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder, max_shard_size="100KB")
    return folder


def budget(store: Path, slots: int, spares: int = 0) -> int:
    """Bytes for so many slots of every layer, and so many spare ones."""
    layers = manifest.load(store).layers
    return slots * sum(layer.extent_bytes for layer in layers) + spares * layers[0].extent_bytes


def prompt(tokens: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 128, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


@torch.inference_mode()
def generate(model: transformers.PreTrainedModel, ids: torch.Tensor, new: int) -> list[list[int]]:
    """Greedy tokens, the prompts' included."""
    mask = torch.ones_like(ids)
    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
    return tokens.tolist()


def eager(checkpoint: Path) -> transformers.PreTrainedModel:
    return with_own_memory(
        transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint, experts_implementation="eager"
        )
    )


@torch.inference_mode()
def run(model: transformers.PreTrainedModel, ids: torch.Tensor, new: int = 12):
    """Greedy tokens, and the logits that chose them."""
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.sequences, torch.stack(output.logits)
