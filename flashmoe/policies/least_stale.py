"""Least-Stale: experts that the current forward pass has not used go first."""

from __future__ import annotations

import numpy as np

from flashmoe.policies.parts.forward_passes import PASS, ForwardPasses, layers_until


class LeastStale(ForwardPasses):
    """Evicts experts not used in the current forward pass first, the layer due last of them.

    After SpecMD (arXiv 2602.03921), whose text was not available. Our reading of its 'temporal
    and spatial locality': among stale experts, as among fresh ones, the layer that runs again
    last goes first, then first in, first out. With a cache per layer it is FIFO.
    """

    name = "least-stale"
    pools = True

    def victim(self, candidates: np.ndarray) -> int:
        highest, victim = -1, candidates[0]
        for key in candidates:
            rank = layers_until(self, key)
            if self.last_pass[key] < self.current[PASS]:
                rank += self.n_layers
            if rank > highest:
                highest, victim = rank, key
        return victim
