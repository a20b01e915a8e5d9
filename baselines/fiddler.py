"""Fiddler (arXiv 2402.07033): popular experts in the fast tier, the others computed where they are.

From the paper: the pinned tier (its GPU) holds the globally most popular (layer, expert) pairs of
a calibration profile, fixed for the run. An expert that is elsewhere is computed on the CPU or
copied first, whichever is faster (latencies.py). From the original's code: one side is chosen for
each expert in turn, nothing overlaps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from baselines import popularity
from baselines.base import Setting
from baselines.pinning import PinningSystem
from flashmoe.engines.transformers.experts.mixture import Mixture


class Fiddler(PinningSystem):
    """Fiddler's orchestration over the same store."""

    name = "fiddler"
    pinned_what = "globally popular experts"

    def choose(self, uses: np.ndarray, room: int) -> list[list[int]]:
        return popularity.most_popular(uses, room)

    def prepare(self, setting: Setting) -> None:
        super().prepare(setting)
        self.reset_counts()

    def reset_counts(self) -> None:
        self.requests = self.hits = self.copied = 0

    def stats(self) -> dict[str, Any]:
        return {"requests": self.requests, "hits": self.hits, "copied": self.copied}

    def run(
        self, layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        mixture = Mixture(self.modules[layer], hidden, index, weights)
        experts, tokens = index.unique(return_counts=True)
        for expert, count in zip(experts.tolist(), tokens.tolist(), strict=True):
            self.requests += 1
            if self.pinned.holds(layer, expert):
                self.hits += 1
                mixture.add(expert, self.pinned.parameters(layer, expert))
            elif self.latencies.copies(count):
                self.copied += 1
                mixture.add(expert, self.copy(layer, expert))
            else:
                mixture.add(expert, self.mapped.parameters(layer, expert))
        return mixture.total()
