"""How many tokens of context a model may have, so that their keys and values fit the machine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from flashmoe.engines.llama.expert_tensors import is_experts
from flashmoe.engines.llama.gguf_head import GGUFHead

# Of the memory that is free beside the dense part: at most so much for the context, and half of
# that for the prefixes of conversations that are not at hand.
_SHARE = 1 / 8
_LEAST_TOKENS, _STEP_TOKENS = 4096, 256  # llama.cpp rounds up to the step
_NUMBER_BYTES = 2  # keys and values are kept as float16
_LAYER = re.compile(r"blk\.(\d+)\.(attn_k\.|attn_kv_a|attn_qkv\.|ssm_)")


class Room(NamedTuple):
    """What a context takes."""

    tokens: int
    context_bytes: int
    prefix_bytes: int  # for prefixes of earlier conversations


def choose(heads: Sequence[GGUFHead], free_bytes: int, tokens: int | None = None) -> Room:
    """The context of a model in these files, where `free_bytes` are left beside its dense part.

    tokens: what is asked for; 0: what the model was trained with; None: what fits, at most what it
    was trained with, and at least 4096 tokens or that.
    """
    each_bytes, share_bytes = token_bytes(heads), int(max(0, free_bytes) * _SHARE)
    trained = heads[0].sizes["context_length"] or _LEAST_TOKENS
    if tokens is None:
        fits = share_bytes // max(1, each_bytes) // _STEP_TOKENS * _STEP_TOKENS
        tokens = min(trained, max(fits, _LEAST_TOKENS))
    tokens = tokens or trained
    context_bytes = tokens * each_bytes
    return Room(tokens, context_bytes, min(context_bytes, share_bytes) // 2)


def token_bytes(heads: Sequence[GGUFHead]) -> int:
    """Of one token's keys and values in all layers: at most, where layers differ."""
    sizes = heads[0].sizes
    per_head = sizes["embedding_length"] // max(1, sizes["attention.head_count"])
    key = sizes["attention.key_length"] or per_head
    value = sizes["attention.value_length"] or per_head
    kv_heads = sizes["attention.head_count_kv"] or sizes["attention.head_count"]
    return _attention_layers(heads) * kv_heads * (key + value) * _NUMBER_BYTES


def dense_bytes(heads: Sequence[GGUFHead]) -> int:
    """Of all tensors but experts."""
    tensors = [tensor for head in heads for tensor in head.tensors]
    return sum(tensor.size_bytes for tensor in tensors if not is_experts(tensor.name))


def _attention_layers(heads: Sequence[GGUFHead]) -> int:
    """Layers that keep keys and values; of those with a state instead, none is kept for a token."""
    found: dict[int, set[str]] = {}
    for head in heads:
        for tensor in head.tensors:
            if match := _LAYER.match(tensor.name):
                found.setdefault(int(match[1]), set()).add(match[2])
    return sum(kinds != {"ssm_"} and kinds != {"attn_qkv.", "ssm_"} for kinds in found.values())
