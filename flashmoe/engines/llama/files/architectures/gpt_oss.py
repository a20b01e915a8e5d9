"""Biases of experts and routers, sinks in the attention, and a window in every other layer."""

from __future__ import annotations

from collections.abc import Iterator

import gguf
import torch

from flashmoe.engines.llama.files.architecture import Architecture, Parameters


class GptOss(Architecture):
    name = "gpt_oss"
    gguf_name = gguf.MODEL_ARCH.GPT_OSS

    def describe(self, writer: gguf.GGUFWriter) -> None:
        super().describe(writer)
        writer.add_sliding_window(self.config["sliding_window"])
        writer.add_expert_feed_forward_length(self.config["intermediate_size"])

    def dense(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        yield from super().dense(f"{name}.weight" if name.endswith(".sinks") else name, tensor)

    def parts(self, parameters: Parameters) -> Parameters:
        """Of transformers' [in, out], gate and up alternating, this makes [out, in] of each."""
        both, bias = parameters["gate_up_proj"].T, parameters["gate_up_proj_bias"]
        return {
            "ffn_gate_exps.weight": both[::2],
            "ffn_up_exps.weight": both[1::2],
            "ffn_down_exps.weight": parameters["down_proj"].T,
            "ffn_gate_exps.bias": bias[::2],
            "ffn_up_exps.bias": bias[1::2],
            "ffn_down_exps.bias": parameters["down_proj_bias"],
        }
