"""Runs Mixture-of-Experts models whose experts stay on the SSD.

`flashmoe.load(path, memory="4GiB")` returns a transformers model, or of a GGUF file a
`llama_cpp.Llama`; use it as usual, then `model.flashmoe.stats()` says what the cache did.
"""

from __future__ import annotations

from pathlib import Path

from flashmoe.engines import load
from flashmoe.errors import FlashMoEError

__version__ = "0.1.0"
__all__ = ["FlashMoEError", "demo_path", "demo_routing_path", "load"]


def demo_path() -> Path:
    """The shipped demo model: a trained OLMoE of 27 M parameters, as a Hugging Face directory."""
    return Path(__file__).parent / "demo" / "model"


def demo_routing_path() -> Path:
    """The demo model's routing on held-out text of six kinds (a trace file)."""
    return Path(__file__).parent / "demo" / "routing.npz"
