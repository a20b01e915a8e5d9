"""As OLMoE, with experts of a width of their own."""

from __future__ import annotations

import gguf

from flashmoe.engines.llama.files.architecture import Architecture


class Qwen3Moe(Architecture):
    name = "qwen3_moe"
    gguf_name = gguf.MODEL_ARCH.QWEN3MOE
