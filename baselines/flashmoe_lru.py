"""FlashMoE under LRU: what its own policy is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

import flashmoe
from baselines.base import Setting, System
from flashmoe.reading.read_queue import Span


class FlashMoELRU(System):
    """The engine as shipped, evicting the least recently used expert."""

    name = "flashmoe-lru"
    policy = "lru"
    prefetch = True
    check_reads = False
    residency = "experts on SSD, cache of `memory` in DRAM; the rest in DRAM"

    def source(self, setting: Setting) -> Path:
        return setting.store

    def load(self, setting: Setting) -> PreTrainedModel:
        self.model = flashmoe.load(
            self.source(setting),
            memory=setting.memory_bytes,
            policy=self.policy,
            prefetch=self.prefetch,
            check_reads=self.check_reads,
        )
        self.engine = self.model.flashmoe
        if self.engine.prefetcher:
            self.lookahead = self.engine.prefetcher.lookahead
        return self.model

    def reset_counts(self) -> None:
        self.engine.reset_counts()

    def stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = self.engine.stats()
        return stats

    def watch(self) -> list[Span]:
        spans: list[Span] = self.engine.watch()
        return spans

    def close(self) -> None:
        self.engine.close()
