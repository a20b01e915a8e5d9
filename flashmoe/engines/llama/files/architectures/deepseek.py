"""Latent attention, shared experts, and first layers without experts."""

from __future__ import annotations

from collections.abc import Iterator

import gguf
import torch

from flashmoe.engines.llama.files.architecture import Architecture


class DeepseekV2(Architecture):
    name = "deepseek_v2"
    gguf_name = gguf.MODEL_ARCH.DEEPSEEK2
    can_fuse = True
    gating = gguf.ExpertGatingFuncType.SOFTMAX

    def describe(self, writer: gguf.GGUFWriter) -> None:
        super().describe(writer)
        config = self.config
        writer.add_leading_dense_block_count(config["first_k_dense_replace"])
        writer.add_expert_shared_count(config["n_shared_experts"])
        writer.add_expert_weights_scale(config["routed_scaling_factor"])
        writer.add_expert_weights_norm(bool(config["norm_topk_prob"]))
        writer.add_expert_gating_func(self.gating)

    def describe_attention(self, writer: gguf.GGUFWriter, head_width: int) -> None:
        """All heads share one latent key, so that llama.cpp sees one wide head of keys."""
        config = self.config
        rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
        writer.add_head_count_kv(1)
        writer.add_kv_lora_rank(rank)
        writer.add_key_length(rank + rope)
        writer.add_value_length(rank)
        writer.add_key_length_mla(config["qk_nope_head_dim"] + rope)
        writer.add_value_length_mla(config["v_head_dim"])
        writer.add_rope_dimension_count(rope)
        if config["q_lora_rank"]:
            writer.add_q_lora_rank(config["q_lora_rank"])

    def dense(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        if not name.endswith("kv_b_proj.weight"):
            yield from super().dense(name, tensor)
            return
        keys, values = self.config["qk_nope_head_dim"], self.config["v_head_dim"]
        heads = tensor.view(-1, keys + values, tensor.shape[-1])
        yield self.name_of(name.replace("kv_b", "k_b")), heads[:, :keys].transpose(1, 2)
        yield self.name_of(name.replace("kv_b", "v_b")), heads[:, keys:]


class DeepseekV3(DeepseekV2):
    """Routers that choose by a sigmoid with a bias, within the best groups of experts."""

    name = "deepseek_v3"
    gating = gguf.ExpertGatingFuncType.SIGMOID

    def describe(self, writer: gguf.GGUFWriter) -> None:
        super().describe(writer)
        writer.add_expert_group_count(self.config["n_group"])
        writer.add_expert_group_used_count(self.config["topk_group"])

    def dense(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        yield from super().dense(name.replace("correction_bias", "correction.bias"), tensor)
