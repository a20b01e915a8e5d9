"""The memory that a conversation's cache of keys and values takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import transformers
from transformers.cache_utils import Cache, DynamicCache, DynamicSlidingWindowLayer

_MEASURED_TOKENS = 8


class CacheMemory(NamedTuple):
    """Bytes of a cache: so many, and so many more for each token."""

    fixed_bytes: int
    token_bytes: int

    def at(self, tokens: int) -> int:
        return self.fixed_bytes + self.token_bytes * tokens

    def fitting(self, budget_bytes: int) -> int | None:
        """The tokens that fit; None: any number."""
        if not self.token_bytes:
            return None
        return max(0, budget_bytes - self.fixed_bytes) // self.token_bytes


def new_cache(model: transformers.PreTrainedModel) -> Cache | None:
    """An empty cache as `generate` would make it, of which any end can be cut off where possible.

    None: this family's `generate` makes one of its own kind.
    """
    if not model._supports_default_dynamic_cache():
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    if all(cache.is_linear):  # `generate` cannot go on from these
        return None
    for layer in cache.layers:
        if type(layer) is DynamicSlidingWindowLayer:  # a class made from it may ignore this
            layer.activate_past_recording()
    return cache


def measure(model: transformers.PreTrainedModel) -> CacheMemory:
    """What two short forward passes leave in a cache."""
    cache = new_cache(model)
    if cache is None:
        return CacheMemory(0, 0)
    ids = torch.zeros((1, _MEASURED_TOKENS), dtype=torch.int64, device=model.device)
    sizes = []
    with torch.inference_mode():
        for _ in range(2):
            model(ids, cache=cache, use_cache=True)
            sizes.append(size_bytes(cache))
    token_bytes = (sizes[1] - sizes[0]) // _MEASURED_TOKENS
    return CacheMemory(sizes[0] - token_bytes * _MEASURED_TOKENS, token_bytes)


def size_bytes(cache: Cache) -> int:
    """Of all memory that a cache holds on to: a view counts as what it is a view of."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for layer in cache.layers
        for tensor in _tensors(vars(layer))
    }
    return sum(storages.values())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
