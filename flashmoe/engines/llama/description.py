"""What a model in GGUF files takes, read from their heads."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from flashmoe.engines.llama.engine import RESERVE_BYTES
from flashmoe.engines.llama.expert_tensors import expert_tensors, parts_of
from flashmoe.engines.llama.ggml import GGML
from flashmoe.engines.llama.gguf_head import GGUFHead, read_head
from flashmoe.engines.model_facts import ModelFacts
from flashmoe.errors import FlashMoEError

_CACHE_BYTES = 2  # of a number in llama.cpp's KV cache: float16, unless it is told otherwise
# Architectures of which every second layer looks back no further than its window.
_HALF_WINDOWS = ("gpt-oss",)
_TABLE, _OUTPUT = "token_embd.weight", "output.weight"


def describe(ggml: GGML, path: Path) -> ModelFacts:
    """Nothing but heads is read. Raises FlashMoEError where they are no MoE model's."""
    heads: list[GGUFHead] = []
    by_layer: Counter[int] = Counter()
    counts: set[int] = set()
    kinds: Counter[int] = Counter()
    parts = parts_of(ggml, path)
    for part in parts:
        head = read_head(ggml, part)
        if head is None:
            raise FlashMoEError(f"{part} is no GGUF file that llama.cpp can read: fetch it again")
        heads.append(head)
        for tensor in expert_tensors(part, head):
            by_layer[tensor.layer] += tensor.size_bytes
            counts.add(tensor.n_experts)
        for place in head.tensors:
            if "_exps." in place.name:
                kinds[place.kind] += place.size_bytes
    if not by_layer:
        raise FlashMoEError(
            f"{path} has no experts: FlashMoE streams Mixture-of-Experts models only"
        )
    places = {place.name: place for head in heads for place in head.tensors}
    experts_bytes = by_layer.total()
    dense_bytes = sum(place.size_bytes for place in places.values()) - experts_bytes
    table_bytes = places[_TABLE].size_bytes if {_TABLE, _OUTPUT} <= places.keys() else 0
    n_experts = max(counts)
    full, windows = _layers(heads[0])
    token_bytes = _cached_bytes(heads[0].attention)
    one_each = experts_bytes // n_experts
    return ModelFacts(
        engine=__package__.rpartition(".")[2],
        architecture=heads[0].architecture,
        weights=ggml.type_name(kinds.most_common(1)[0][0]),
        layers=len(by_layer),
        n_experts=n_experts,
        top_k=max(head.top_k for head in heads),
        experts_bytes=experts_bytes,
        dense_bytes=dense_bytes,
        dense_token_bytes=dense_bytes - table_bytes,
        beside_bytes=0,
        parameters=sum(math.prod(place.shape) for place in places.values()),
        kv_bytes=full * token_bytes,
        window_kv_bytes=windows * token_bytes,
        window_tokens=heads[0].attention["attention.sliding_window"],
        least_bytes=max(one_each, *by_layer.values()),
        reserve_bytes=RESERVE_BYTES,
    )


def _layers(head: GGUFHead) -> tuple[int, int]:
    """Those that see all tokens of the context, and those that see a window of them."""
    count = head.attention["block_count"]
    windows = count // 2 if head.architecture in _HALF_WINDOWS else 0
    return count - windows, windows


def _cached_bytes(attention: dict[str, int]) -> int:
    """What a layer keeps of a token."""
    if latent := attention["attention.kv_lora_rank"]:
        return (latent + attention["rope.dimension_count"]) * _CACHE_BYTES
    heads = attention["attention.head_count"]
    width = attention["embedding_length"] // max(heads, 1)
    keys = attention["attention.key_length"] or width
    values = attention["attention.value_length"] or width
    return (attention["attention.head_count_kv"] or heads) * (keys + values) * _CACHE_BYTES
