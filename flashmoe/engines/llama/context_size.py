"""How many tokens of context a model may have, so that their keys and values fit the machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from flashmoe.engines.llama.expert_tensors import is_experts
from flashmoe.engines.llama.gguf_head import GGUFHead
from flashmoe.engines.llama.kv_cache import of_token

# Of the memory that is free beside the dense part: at most so much for the context, and half of
# that for the prefixes of conversations that are not at hand.
_SHARE = 1 / 8
_LEAST_TOKENS, _STEP_TOKENS = 4096, 256  # llama.cpp rounds up to the step


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
    each_bytes, share_bytes = of_token(heads).bytes_at_most, int(max(0, free_bytes) * _SHARE)
    trained = heads[0].sizes["context_length"] or _LEAST_TOKENS
    if tokens is None:
        fits = share_bytes // max(1, each_bytes) // _STEP_TOKENS * _STEP_TOKENS
        tokens = min(trained, max(fits, _LEAST_TOKENS))
    tokens = tokens or trained
    context_bytes = tokens * each_bytes
    return Room(tokens, context_bytes, min(context_bytes, share_bytes) // 2)


def dense_bytes(heads: Sequence[GGUFHead]) -> int:
    """Of all tensors but experts."""
    tensors = [tensor for head in heads for tensor in head.tensors]
    return sum(tensor.size_bytes for tensor in tensors if not is_experts(tensor.name))
