"""FlashMoE as users get it, and with one part taken away or changed at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedModel

import flashmoe
from baselines.base import Setting, System
from flashmoe import policies
from flashmoe.cache.expert_cache import ExpertCache, Wave
from flashmoe.events import Event
from flashmoe.reading.read_queue import Span
from flashmoe.store import manifest as manifests


class FlashMoE(System):
    """The engine with its default policy; `flashmoe:POLICY` with another one."""

    name = "flashmoe"
    policy: str = "learned"
    prefetch: ClassVar[bool] = True
    check_reads: ClassVar[bool] = False
    arithmetic: ClassVar[str] = "exact"
    residency = "experts on SSD, cache of `memory` in DRAM; the rest in DRAM"

    def __init__(self, policy: str = "") -> None:
        self.policy = policy or type(self).policy

    @classmethod
    def options(cls, argument: str) -> dict[str, object]:
        if cls.policy != FlashMoE.policy:  # it is what that system is
            return super().options(argument)
        policies.get(argument)
        return {"policy": argument}

    def source(self, setting: Setting) -> Path:
        return setting.store

    def load(self, setting: Setting) -> PreTrainedModel:
        model: PreTrainedModel = flashmoe.load(
            self.source(setting),
            memory=setting.memory_bytes,
            policy=self.policy,
            prefetch=self.prefetch,
            check_reads=self.check_reads,
            arithmetic=self.arithmetic,
        )
        self.engine: Any = model.flashmoe
        if self.engine.residency.prefetcher.spares:
            self.lookahead = self.engine.lookahead
        return model

    def reset_counts(self) -> None:
        self.engine.reset_counts()

    def stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = self.engine.stats()
        return stats

    def record_spans(self) -> list[Span]:
        spans: list[Span] = self.engine.record_spans()
        return spans

    def close(self) -> None:
        self.engine.close()


class FlashMoELRU(FlashMoE):
    """Evicts the least recently used expert: what the default policy is compared with."""

    name = "flashmoe-lru"
    policy = "lru"


class FlashMoELFU(FlashMoE):
    """Evicts the least frequently used expert, the other policy that everybody knows."""

    name = "flashmoe-lfu"
    policy = "lfu"


class FlashMoENoPrefetch(FlashMoE):
    """Reads an expert only when it is surely needed: what prefetching is worth."""

    name = "flashmoe-no-prefetch"
    prefetch = False


class FlashMoEFast(FlashMoE):
    """Multiplies in the way that is the fastest here: what transformers' last bits cost."""

    name = "flashmoe-fast"
    arithmetic = "fast"


class FlashMoEChecked(FlashMoE):
    """Compares every read with its checksum, not only the first of each expert."""

    name = "flashmoe-checked"
    check_reads = True


class FlashMoEInPlace(FlashMoE):
    """Reads experts out of the checkpoint's shards: what the packed store is worth."""

    name = "flashmoe-in-place"

    def source(self, setting: Setting) -> Path:
        return setting.checkpoint


class _Forgetful(ExpertCache):
    """Drops everything before each event, so that every request is a miss."""

    def waves(self, event: Event) -> Iterator[Wave]:
        for key in self.resident:
            self.forget(key)
        return super().waves(event)


class OnDemand(FlashMoE):
    """Reads every expert each time a token needs it: what streaming without a cache is worth."""

    name = "on-demand"
    residency = "experts on SSD, slots for one token's experts at one layer; the rest in DRAM"
    policy = "lru"
    uses_budget = False
    prefetch = False

    def load(self, setting: Setting) -> PreTrainedModel:
        manifest = manifests.load(setting.store)
        one_token = manifest.top_k * max(layer.extent_bytes for layer in manifest.layers)
        model = super().load(replace(setting, memory_bytes=one_token))
        pools = self.engine.residency.pools
        pools.restart([_Forgetful(pool.cache.policy) for pool in pools.all])
        return model
