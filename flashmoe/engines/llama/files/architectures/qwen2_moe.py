"""A shared expert beside the others, with a gate of its own; biases in the attention."""

from __future__ import annotations

from collections.abc import Iterator

import gguf
import torch

from flashmoe.engines.llama.files.architecture import Architecture


class Qwen2Moe(Architecture):
    name = "qwen2_moe"
    gguf_name = gguf.MODEL_ARCH.QWEN2MOE

    def describe(self, writer: gguf.GGUFWriter) -> None:
        super().describe(writer)
        width = self.config["shared_expert_intermediate_size"]
        writer.add_expert_shared_feed_forward_length(width)

    def dense(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        if name.endswith("shared_expert_gate.weight"):
            tensor = tensor.reshape(-1)
        yield from super().dense(name, tensor)
