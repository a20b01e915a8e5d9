"""How many tokens an engine served, from what its caches count anyway."""

from __future__ import annotations

from flashmoe.engines.base import Engine


def tokens_served(engine: Engine) -> int:
    """Since load, prompts included: of the layer that served the most, since some skip tokens.

    A cache that all layers share counts each token once a layer.
    """
    with engine.lock:
        pools = engine.residency.pools
        counts = [cache.tokens for cache in pools.caches]
        if pools.slots.shared:
            return max(counts, default=0) // len(engine.manifest.layers)
        return max(counts, default=0)
