"""What a family says of itself: its settings, its tensors' names, and how experts lie."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator
from typing import Any, ClassVar

import gguf
import torch

from flashmoe.engines.llama.files import vocabulary
from flashmoe.errors import FlashMoEError

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
Parameters = dict[str, torch.Tensor]


class Architecture(ABC):
    """One family. Tensors may be on torch's meta device, where only their shapes are wanted."""

    name: ClassVar[str]  # transformers' model_type
    gguf_name: ClassVar[Any]  # of gguf.MODEL_ARCH
    can_fuse = False  # llama.cpp takes gate and up as one tensor, too

    def __init__(self, config: dict[str, Any]) -> None:
        """config: as transformers writes it."""
        self.config = config
        self.layers = int(config["num_hidden_layers"])
        self.n_experts = int(next(config[name] for name in _COUNTS if config.get(name)))
        self._names = gguf.get_tensor_name_map(self.gguf_name, self.layers)

    def describe(self, writer: gguf.GGUFWriter) -> None:
        """Add the settings that llama.cpp wants."""
        config = self.config
        heads = config["num_attention_heads"]
        head_width = config.get("head_dim") or config["hidden_size"] // heads
        writer.add_vocab_size(config["vocab_size"])
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_block_count(self.layers)
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(heads)
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_expert_count(self.n_experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
        if "moe_intermediate_size" in config:
            writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
        self.describe_attention(writer, head_width)
        self._describe_positions(writer)
        vocabulary.add_to(writer, config["vocab_size"])

    def describe_attention(self, writer: gguf.GGUFWriter, head_width: int) -> None:
        writer.add_head_count_kv(self.config["num_key_value_heads"])
        writer.add_key_length(head_width)
        writer.add_value_length(head_width)

    def _describe_positions(self, writer: gguf.GGUFWriter) -> None:
        rope = self.config["rope_parameters"]
        writer.add_rope_freq_base(rope["rope_theta"])
        if rope["rope_type"] == "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(rope["factor"])
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
            writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
            writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])

    def dense(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """A tensor that belongs to no expert, by transformers' name -> what the file has for it.

        Raises FlashMoEError where the file has no name for it.
        """
        yield self.name_of(name), tensor

    def name_of(self, name: str) -> str:
        found: str | None = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise FlashMoEError(f"GGUF has no name for {name}")
        return found

    def expert(self, parameters: Parameters, *, fuse: bool) -> Parameters:
        """One expert's parameters by transformers' names -> by the file's, those of each part.

        fuse: gate and up are one. Raises FlashMoEError where llama.cpp does not take them so.
        """
        if fuse and not self.can_fuse:
            raise FlashMoEError(f"llama.cpp takes no fused gate and up of the family {self.name}")
        parts = self.parts(parameters)
        if fuse:
            both = [parts.pop(f"ffn_{part}_exps.weight") for part in ("gate", "up")]
            parts["ffn_gate_up_exps.weight"] = torch.cat(both)
        return parts

    def parts(self, parameters: Parameters) -> Parameters:
        """One expert's gate, up and down."""
        gate, up = parameters["gate_up_proj"].chunk(2)
        return {
            "ffn_gate_exps.weight": gate,
            "ffn_up_exps.weight": up,
            "ffn_down_exps.weight": parameters["down_proj"],
        }
