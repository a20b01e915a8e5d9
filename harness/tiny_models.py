"""The smallest model of every MoE family that the installed transformers has.

Which families there are is read off transformers itself. A family's default configuration is
shrunk by the names of its settings; what a family insists on beside that is in EXTRA.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from flashmoe.errors import FlashMoEError

_MODELS = Path(transformers.__file__).parent / "models"
_MARK = "@use_experts_implementation"
_MOST_PARAMETERS = 30_000_000
# A router's, of which published half-precision checkpoints keep float32 (GLM-5.2's lie near 7):
# rounded to bfloat16 they choose other experts.
_ROUTER_BIAS = re.compile(r"(e_score_correction_bias|expert_bias|balancing_biases)$")

# by setting; a family has some of them
SMALL = (
    dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8
    )
    | dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_top_k", "moe_topk"), 2
    )
    | dict.fromkeys(
        ("num_shared_experts", "n_shared_experts", "moe_num_shared_experts", "n_group",
         "num_expert_group", "topk_group", "num_dense_layers", "first_k_dense_replace",
         "mamba_n_groups"), 1
    )
    | dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "qk_head_dim",
         "shared_experts_intermediate_size", "shared_intermediate_size",
         "moe_shared_expert_intermediate_size"), 24
    )
    | dict.fromkeys(
        ("num_attention_heads", "num_hidden_layers", "num_heads", "linear_num_value_heads",
         "mamba_num_heads", "mamba_n_heads"), 4
    )
    | dict.fromkeys(
        ("num_key_value_heads", "linear_num_key_heads", "linear_num_heads", "index_n_heads",
         "n_groups", "o_groups", "hc_mult", "depth", "num_layers", "encoder_layers",
         "layer_group_size", "mamba_expand", "split_ngram_parts"), 2
    )
    | dict.fromkeys(
        ("hidden_size", "moe_hidden_size", "embed_dim", "d_model", "out_hidden_size",
         "ple_embed_dim"), 32
    )
    | dict.fromkeys(
        ("intermediate_size", "dense_intermediate_size", "encoder_ffn_dim"), 48
    )
    | dict.fromkeys(
        ("head_dim", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "v_head_dim",
         "index_head_dim", "index_topk", "sliding_window", "router_hidden_size", "mamba_head_dim",
         "mamba_d_head", "chunk_size", "mamba_chunk_size"), 16
    )
    | dict.fromkeys(
        ("qk_rope_head_dim", "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim",
         "ssm_state_size", "mamba_d_state", "o_lora_rank", "hc_lowrank", "gated_norm_rank",
         "hidden_size_per_layer_input", "index_block_size"), 8
    )
    | dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 128)
    | dict(max_position_embeddings=512, index_topk_blocks=4, encoder_attention_heads=4,
           ngram_vocab_size_base=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
)  # fmt: skip

_MIXED = {"layer_types": ["linear_attention", "full_attention"] * 2}
_GEMMA = dict(enable_moe_block=True, num_experts=8, top_k_experts=2, moe_intermediate_size=24)
_QSA = dict(
    indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=16,
    indexer_compress_ratio=4,
)  # fmt: skip


def _sections(*sizes: int, **more: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "mrope_section": sizes}
            | more}  # fmt: skip


EXTRA: dict[str, dict[str, Any]] = {
    "deepseek_ocr2": {
        "text_config": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense"] + ["sparse"] * 3}
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "diffusion_gemma": {"text_config": _GEMMA},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {"head_dim": 24},
    "ernie4_5_vl_moe": {
        "text_config": {"moe_intermediate_size": [24, 16], "head_dim": 16} | _sections(3, 3, 2)
    },
    "gemma4": _GEMMA,
    "glm4v_moe": {"text_config": {"head_dim": 16} | _sections(2, 1, 1, partial_rotary_factor=0.5)},
    "glm5_next": {"text_config": {"qk_rope_head_dim": 0, "head_dim": 0}},
    "granitemoehybrid": _MIXED,
    "hunyuan_v1_moe": {"head_dim": 16},
    "hy_v4_vl": {"text_config": _sections(2, 1, 1)},
    "inkling2": {"unpadded_vocab_size": 120},
    "inkling2_loop": {"unpadded_vocab_size": 120},
    "jamba": dict(
        attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1
    ),
    "kimi_linear": _MIXED,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mistral4": {"rope_parameters": None},
    "muse_spark": {"audio_config": {"hidden_sizes": [16] * 4, "depths": [1] * 4}},
    "qwen3_omni_moe": {"vision_start_token_id": 3},  # which its `generate` asks for
    "qwen4_exp": _QSA,
    "zaya": {"num_experts_per_tok": 1},  # the only number that it takes
}
_ARCHITECTURES = {  # where the usual endings name a class without experts, or none
    "diffusion_gemma": "DiffusionGemmaForBlockDiffusion",
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration",
}
_ENDINGS = ("ForCausalLM", "ForConditionalGeneration", "Model")


def families() -> list[str]:
    """Every model type whose experts go through transformers' ExpertsInterface."""
    files = sorted(_MODELS.glob("*/modeling_*.py"))
    return [file.parent.name for file in files if _MARK in file.read_text("utf-8")]


def architecture(family: str) -> Any:
    """The class that generates text, or the bare model where there is none."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    if family in _ARCHITECTURES:
        return getattr(module, _ARCHITECTURES[family])
    for ending in _ENDINGS:
        for name in module.__all__:
            model_class: Any = getattr(module, name)
            if name.endswith(ending) and getattr(model_class, "config_class", None) is not None:
                return model_class
    raise FlashMoEError(f"{family}: no architecture of transformers {transformers.__version__}")


def make(family: str) -> PreTrainedModel:
    """A random model of some thousand parameters, float32, in eval mode; always the same."""
    model_class = architecture(family)
    config_class = model_class.config_class
    settings = _merged(_shrunk(config_class().to_dict()), EXTRA.get(family, {}))
    config = config_class(**settings)
    config.dtype = "float32"
    torch.manual_seed(0)
    model = model_class(config).float().eval()
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > _MOST_PARAMETERS:
        raise FlashMoEError(f"{family}: {count} parameters; shrink its settings in EXTRA")
    with torch.no_grad():  # larger than the default spread, so that routing varies
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
        for bias in _router_biases(model):
            bias.copy_(7 + torch.rand(bias.shape) / 4)
    return model


def cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """`model` as a checkpoint in `dtype` has it: its routers' biases stay float32."""
    biases = [(bias, bias.detach().clone()) for bias in _router_biases(model)]
    model.to(dtype)
    for bias, before in biases:
        bias.data = before
    model.config.dtype = dtype
    return model


def _router_biases(model: PreTrainedModel) -> list[torch.Tensor]:
    named = (*model.named_parameters(), *model.named_buffers())
    return [tensor for name, tensor in named if _ROUTER_BIAS.search(name)]


def output(result: Any) -> torch.Tensor:
    """Of a forward pass: logits, or a bare model's hidden states."""
    tensor: torch.Tensor = result["logits" if "logits" in result else "last_hidden_state"]
    return tensor


def _shrunk(defaults: dict[str, Any]) -> dict[str, Any]:
    """Only what SMALL knows of a configuration, nested ones included."""
    small = dict(_small_values(defaults))
    if "qk_rope_head_dim" in small and "head_dim" in small:  # multi-head latent attention
        small["head_dim"] = small["qk_rope_head_dim"]
    if "kv_lora_rank" in small and "num_key_value_heads" in small:
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small


def _small_values(defaults: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in defaults.items():
        if isinstance(value, dict) and key.endswith("_config"):
            kind = {"model_type": value["model_type"]} if "model_type" in value else {}
            yield key, _shrunk(value) | kind
        elif key == "pad_token_id" or (key in SMALL and type(value) is int):
            yield key, SMALL[key]


def _merged(settings: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    nested = {
        key: _merged(settings.get(key) or {}, value)
        for key, value in more.items()
        if key.endswith("_config")
    }
    return settings | more | nested
