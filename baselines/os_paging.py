"""What users do today: map the weights into memory and let the operating system page them.

llama.cpp's default (`--mmap`). Taken over: weights are read where they are mapped, nothing is
copied or evicted by the program. Decided: the mapping is of the store, where an expert is one
contiguous extent; in a GGUF file its matrices lie in three places. That favours the baseline.
"""

from __future__ import annotations

import mmap

import torch

from baselines.base import Setting
from baselines.layered import LayeredSystem
from baselines.tiers import MappedTier
from flashmoe.engines.transformers.experts.mixture import Mixture


class OSPaging(LayeredSystem):
    """No policy: the page cache decides which experts are in DRAM."""

    name = "os-paging"
    residency = "experts memory-mapped, in the page cache as the kernel likes; the rest in DRAM"
    advice_for_all: int | None = None  # madvise once, on the whole mapping
    advice_for_routed: int | None = None  # madvise on what a layer needs, before it computes

    def prepare(self, setting: Setting) -> None:
        self.mapped = MappedTier(setting.store, self.manifest)
        if self.advice_for_all is not None:
            self.mapped.advise(self.advice_for_all)

    def run(
        self, layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        needed = index.unique().tolist()
        if self.advice_for_routed is not None:
            for expert in needed:
                self.mapped.advise(self.advice_for_routed, layer, expert)

        mixture = Mixture(self.modules[layer], hidden, index, weights)
        for expert in needed:
            mixture.add(expert, self.mapped.parameters(layer, expert))
        return mixture.total()


class OSPagingRandom(OSPaging):
    """With MADV_RANDOM: the kernel reads no page that was not touched."""

    name = "os-paging-random"
    residency = OSPaging.residency + "; MADV_RANDOM"
    advice_for_all = mmap.MADV_RANDOM


class OSPagingWillNeed(OSPaging):
    """With MADV_WILLNEED on routed experts, as ik_llama.cpp and llama.cpp PR 26003 do."""

    name = "os-paging-willneed"
    residency = OSPaging.residency + "; MADV_WILLNEED on routed experts"
    advice_for_routed = mmap.MADV_WILLNEED
