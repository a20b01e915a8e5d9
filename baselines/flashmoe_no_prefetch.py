"""FlashMoE without guesses: what prefetching is worth."""

from __future__ import annotations

from baselines.flashmoe_learned import FlashMoELearned


class FlashMoENoPrefetch(FlashMoELearned):
    """The engine with its default policy; an expert is read only when it is surely needed."""

    name = "flashmoe-no-prefetch"
    prefetch = False
