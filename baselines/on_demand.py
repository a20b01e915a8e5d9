"""The FlashMoE store and reader without a cache: what streaming alone is worth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from transformers import PreTrainedModel

from baselines.base import Setting
from baselines.flashmoe_lru import FlashMoELRU
from flashmoe.cache.expert_cache import ExpertCache, Wave
from flashmoe.events import Event
from flashmoe.store import manifest as manifests


class _Forgetful(ExpertCache):
    """Drops everything before each event, so that every request is a miss."""

    def waves(self, event: Event) -> Iterator[Wave]:
        for key in self.resident:
            self.forget(key)
        return super().waves(event)


class OnDemand(FlashMoELRU):
    """Reads every expert from the SSD each time a token needs it."""

    name = "on-demand"
    residency = "experts on SSD, slots for one token's experts at one layer; the rest in DRAM"
    uses_budget = False
    prefetch = False

    def load(self, setting: Setting) -> PreTrainedModel:
        manifest = manifests.load(setting.store)
        one_token = manifest.top_k * max(layer.extent_bytes for layer in manifest.layers)
        model = super().load(replace(setting, memory_bytes=one_token))
        self.engine.use([_Forgetful(cache.policy) for cache in self.engine.caches])
        return model
