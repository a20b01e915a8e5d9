"""Fixed factors on embeddings, attention, residuals and logits."""

from __future__ import annotations

from collections.abc import Iterator

import gguf
import torch

from flashmoe.engines.llama.files.architectures.mixtral import Mixtral


class GraniteMoe(Mixtral):
    name = "granitemoe"
    gguf_name = gguf.MODEL_ARCH.GRANITE_MOE

    def describe(self, writer: gguf.GGUFWriter) -> None:
        super().describe(writer)
        writer.add_attention_scale(self.config["attention_multiplier"])
        writer.add_embedding_scale(self.config["embedding_multiplier"])
        writer.add_residual_scale(self.config["residual_multiplier"])
        writer.add_logit_scale(self.config["logits_scaling"])

    def dense(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        yield from super().dense(name.replace("router.weight", "router.layer.weight"), tensor)
