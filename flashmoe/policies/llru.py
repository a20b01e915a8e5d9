"""Layer-aware least recently used."""

from __future__ import annotations

import numpy as np

from flashmoe.policies.parts.forward_passes import PASS, ForwardPasses, layers_until


class LLRU(ForwardPasses):
    """Evicts the expert last used the most forward passes ago; of those, the layer due last.

    After Angelopoulos, Marchal, Obrecht, Simon, 'Cache Management for Mixture-of-Experts
    LLMs' (arXiv 2509.02408): on a cache that all layers share, plain LRU evicts the very
    layer that runs next. The ranking by (pass, layer) is our reading of its abstract,
    since its pseudocode was not available. With a cache per layer it is LRU.
    """

    name = "llru"
    pools = True

    def victim(self, candidates: np.ndarray) -> int:
        highest, victim = -1, candidates[0]
        for key in candidates:
            age = self.current[PASS] - self.last_pass[key]
            rank = age * self.n_layers + layers_until(self, key)
            if rank > highest:
                highest, victim = rank, key
        return victim
