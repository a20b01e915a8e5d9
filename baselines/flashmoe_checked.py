"""FlashMoE that trusts no read: what checksums cost."""

from __future__ import annotations

from baselines.flashmoe_lru import FlashMoELRU


class FlashMoEChecked(FlashMoELRU):
    """The engine as shipped, comparing every read with its checksum, not only the first."""

    name = "flashmoe-checked"
    policy = "learned"
    check_reads = True
