"""Few large experts, under the name of the architecture that is llama's but for them."""

from __future__ import annotations

from collections.abc import Iterator

import gguf
import torch

from flashmoe.engines.llama.files.architecture import Architecture


class Mixtral(Architecture):
    name = "mixtral"
    gguf_name = gguf.MODEL_ARCH.LLAMA

    def dense(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        if name.endswith("q_proj.weight"):
            tensor = by_pairs(tensor, self.config["num_attention_heads"])
        elif name.endswith("k_proj.weight"):
            tensor = by_pairs(tensor, self.config["num_key_value_heads"])
        yield from super().dense(name, tensor)


def by_pairs(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows [heads * width, in] as llama.cpp rotates them here: neighbours, not halves, in pairs."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, -1)
    return halves.transpose(1, 2).reshape(tensor.shape)
