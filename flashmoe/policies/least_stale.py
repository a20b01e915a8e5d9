"""Least-Stale: what the current forward pass has not used goes first."""

from __future__ import annotations

import numpy as np

from flashmoe.policies.parts.forward_passes import ForwardPasses, layers_until


class LeastStale(ForwardPasses):
    """Evicts experts not used in the current forward pass first, the layer due last of them.

    SpecMD (arXiv 2602.03921). Its text was not at hand: the order among stale experts (the
    layer that runs again last, then first in, first out) and among fresh ones (the same) is
    our reading of 'temporal and spatial locality'. With a cache per layer it is FIFO.
    """

    name = "least-stale"
    pools = True

    def victim(self, candidates: np.ndarray) -> int:
        best, worst = -1, candidates[0]
        for key in candidates:
            rank = layers_until(self, key)
            if self.last_pass[key] < self.current[0]:
                rank += self.n_layers
            if rank > best:
                best, worst = rank, key
        return worst
