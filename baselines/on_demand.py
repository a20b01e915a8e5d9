"""The FlashMoE store and reader without a cache: what streaming alone is worth."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedModel

from baselines.flashmoe_lru import FlashMoELRU
from flashmoe.cache import ExpertCache, Wave
from flashmoe.events import Event


class _Forgetful(ExpertCache):
    """Drops everything before each event, so that every request is a miss."""

    def waves(self, event: Event) -> Iterator[Wave]:
        for key in self.resident:
            self.forget(key)
        return super().waves(event)


class OnDemand(FlashMoELRU):
    """Reads every expert from the SSD each time a token needs it."""

    name = "on-demand"
    residency = "experts on SSD, slots for one token's experts of a layer; the rest in DRAM"
    uses_budget = False
    prefetch = False

    def load(self, checkpoint: Path, store: Path, memory_bytes: int) -> PreTrainedModel:
        model = super().load(checkpoint, store, memory_bytes)
        self.engine.caches = [_Forgetful(cache.policy) for cache in self.engine.caches]
        for layer in self.engine.layers:
            layer.cache = self.engine.caches[0 if self.engine.slots.shared else layer.number]
        return model
