"""What a model in GGUF files takes, read from their heads."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from flashmoe.engines.llama import kv_cache
from flashmoe.engines.llama.engine import RESERVE_BYTES
from flashmoe.engines.llama.expert_tensors import expert_tensors, heads_of
from flashmoe.engines.llama.ggml import GGML
from flashmoe.engines.model_facts import ModelFacts
from flashmoe.errors import FlashMoEError

_TABLE, _OUTPUT = "token_embd.weight", "output.weight"


def describe(ggml: GGML, path: Path) -> ModelFacts:
    """Nothing but heads is read. Raises FlashMoEError where they are no MoE model's."""
    by_layer: Counter[int] = Counter()
    counts: set[int] = set()
    kinds: Counter[int] = Counter()
    by_part = heads_of(ggml, path)
    heads = list(by_part.values())
    for part, head in by_part.items():
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
    cache = kv_cache.of_token(heads)
    weights_of = {name: math.prod(place.shape) for name, place in places.items()}
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
        parameters=sum(weights_of.values()),
        expert_parameters=sum(n for name, n in weights_of.items() if name.endswith("_exps.weight")),
        kv_bytes=cache.full_layers * cache.layer_bytes,
        window_kv_bytes=cache.window_layers * cache.layer_bytes,
        window_tokens=heads[0].sizes["attention.sliding_window"],
        least_bytes=max(one_each, *by_layer.values()),
        reserve_bytes=RESERVE_BYTES,
    )
