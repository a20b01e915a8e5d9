"""FlashMoE on the checkpoint itself: what the packed store is worth."""

from __future__ import annotations

from pathlib import Path

from baselines.base import Setting
from baselines.flashmoe_lru import FlashMoELRU


class FlashMoEInPlace(FlashMoELRU):
    """The engine as shipped, reading experts out of the checkpoint's shards."""

    name = "flashmoe-in-place"
    policy = "learned"

    def source(self, setting: Setting) -> Path:
        return setting.checkpoint
