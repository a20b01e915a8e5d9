"""The plain layout: gate, up and down, and a norm of queries and keys."""

from __future__ import annotations

import gguf

from flashmoe.engines.llama.files.architecture import Architecture


class Olmoe(Architecture):
    name = "olmoe"
    gguf_name = gguf.MODEL_ARCH.OLMOE
