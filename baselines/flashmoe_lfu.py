"""FlashMoE under LFU, the other policy that everybody knows."""

from __future__ import annotations

from baselines.flashmoe_lru import FlashMoELRU


class FlashMoELFU(FlashMoELRU):
    """The engine as shipped, evicting the least frequently used expert."""

    name = "flashmoe-lfu"
    policy = "lfu"
