"""How many bytes llama.cpp keeps of a token: the keys and values of its attention layers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from flashmoe.engines.llama.gguf_head import GGUFHead

_NUMBER_BYTES = 2  # float16, unless it is told otherwise
_LAYER = re.compile(r"blk\.(\d+)\.(attn_k\.|attn_kv_a|attn_qkv\.|ssm_)")
# Architectures of which every second layer looks back no further than its window.
_HALF_WINDOWS = ("gpt-oss",)


class TokenCache(NamedTuple):
    """What is kept of one token."""

    layer_bytes: int
    """Of each layer that keeps something, at most."""
    full_layers: int
    """Those that see all tokens of the context."""
    window_layers: int
    """Those that see a window of them."""

    @property
    def bytes_at_most(self) -> int:
        """In all layers, within their windows."""
        return (self.full_layers + self.window_layers) * self.layer_bytes


def of_token(heads: Sequence[GGUFHead]) -> TokenCache:
    """For the model in these files."""
    count = _attention_layers(heads)
    windows = count // 2 if heads[0].architecture in _HALF_WINDOWS else 0
    return TokenCache(_layer_bytes(heads[0].sizes), count - windows, windows)


def _layer_bytes(sizes: Mapping[str, int]) -> int:
    if latent := sizes["attention.kv_lora_rank"]:
        return (latent + sizes["rope.dimension_count"]) * _NUMBER_BYTES
    heads = sizes["attention.head_count"]
    width = sizes["embedding_length"] // max(heads, 1)
    keys = sizes["attention.key_length"] or width
    values = sizes["attention.value_length"] or width
    return (sizes["attention.head_count_kv"] or heads) * (keys + values) * _NUMBER_BYTES


def _attention_layers(heads: Sequence[GGUFHead]) -> int:
    """Layers that keep keys and values; of those with a state instead, none is kept for a token."""
    found: dict[int, set[str]] = {}
    for head in heads:
        for tensor in head.tensors:
            if match := _LAYER.match(tensor.name):
                found.setdefault(int(match[1]), set()).add(match[2])
    return sum(kinds != {"ssm_"} and kinds != {"attn_qkv.", "ssm_"} for kinds in found.values())
