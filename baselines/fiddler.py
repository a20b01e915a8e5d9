"""Fiddler (arXiv 2402.07033): popular experts in the fast tier, the others computed where they are.

From the paper: the pinned tier (its GPU) holds the globally most popular (layer, expert) pairs of
a calibration profile, fixed for the run. An expert that is elsewhere is computed on the CPU,
unless so many tokens need it that copying its weights to the pinned tier, and computing there, is
faster by a latency model. From the original's code: one side is chosen for each expert in turn,
nothing overlaps. Decided here: the latencies are measured at start (the code ships constants for
one machine), each as a line in the number of tokens, of which a GPU's constant is the flat case.
The pinned tier takes a share of the budget; the rest is page cache for the mapped tier, since
without a GPU both are the same memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from baselines import popularity
from baselines.base import Setting
from baselines.layered import LayeredSystem
from baselines.tiers import MappedTier, PinnedTier
from flashmoe.engines.transformers.experts.expert_arithmetic import expert_output
from flashmoe.engines.transformers.experts.mixture import Mixture
from flashmoe.memory.host_arena import HostArena
from flashmoe.quant import Parameters

PINNED_SHARE = 0.5
_MEASURED_TOKENS = (1, 8, 32)
_REPEATS = 5


class Latencies(NamedTuple):
    """Seconds for one expert; computing is a line in the tokens: (a token's, constant part)."""

    cpu: tuple[float, float]
    pinned: tuple[float, float]
    copy: float

    def copies(self, tokens: int) -> bool:
        """Is copying to the pinned tier, to compute there, faster than computing on the CPU?"""
        on_cpu = self.cpu[0] * tokens + self.cpu[1]
        return on_cpu > self.copy + self.pinned[0] * tokens + self.pinned[1]


class Fiddler(LayeredSystem):
    """Fiddler's orchestration over the same store."""

    name = "fiddler"
    residency = (
        f"{PINNED_SHARE:.0%} of the budget: globally popular experts, pinned; "
        "the others memory-mapped; the rest in DRAM"
    )

    def prepare(self, setting: Setting) -> None:
        extent_bytes = max(layer.extent_bytes for layer in self.manifest.layers)
        uses = popularity.counts(setting.profile, self.manifest)
        room = int(setting.memory_bytes * PINNED_SHARE) // extent_bytes - 1  # one for copies
        popular = popularity.most_popular(uses, max(0, min(room, uses.size)))
        self.mapped = MappedTier(setting.store, self.manifest)
        self.pinned = PinnedTier(setting.store, self.manifest, popular)
        self.staging = HostArena(self.manifest.layers[0], 1)
        self.latencies = self.measure()
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

    def copy(self, layer: int, expert: int) -> Parameters:
        """The expert's parameters, copied to the pinned tier's staging slot."""
        self.mapped.copy(layer, expert, self.staging.slots[0])
        return self.staging.parameters[0]

    def measure(self) -> Latencies:
        """On one expert, as if the mapped tier were all in DRAM, which the original assumes."""
        module = self.modules[0]
        mapped = self.mapped.parameters(0, 0)
        pinned = self.copy(0, 0)
        width, dtype = self.model.config.get_text_config().hidden_size, self.model.dtype

        def line(parameters: Parameters) -> tuple[float, float]:
            seconds = []
            for tokens in _MEASURED_TOKENS:
                x = torch.ones(tokens, width, dtype=dtype)
                seconds.append(
                    _seconds(lambda x=x: expert_output(module, parameters, x))  # type: ignore[misc]
                )
            slope, constant = np.polyfit(_MEASURED_TOKENS, seconds, 1)
            return float(slope), float(constant)

        with torch.inference_mode():
            return Latencies(line(mapped), line(pinned), _seconds(lambda: self.copy(0, 0)))

    def close(self) -> None:
        self.pinned.close()
        self.staging.close()


def _seconds(work: Callable[[], object]) -> float:
    """The best of a few repetitions, the first of which warms up."""
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)
