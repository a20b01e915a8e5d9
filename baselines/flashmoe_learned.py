"""FlashMoE as users get it."""

from __future__ import annotations

from baselines.flashmoe_lru import FlashMoELRU


class FlashMoELearned(FlashMoELRU):
    """The engine with its default policy."""

    name = "flashmoe"
    policy = "learned"
