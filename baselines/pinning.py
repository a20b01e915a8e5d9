"""What Fiddler and DAOP share: a part of the budget pins experts, the others stay mapped.

The originals pin as much as their GPU holds. Decided here: the pinned tier takes a share of the
budget, a half unless the name says another one (`fiddler:0.25`); the rest is page cache for the
mapped tier, since without a GPU both are the same memory. `fiddler:0.25,random` pins at random
in place of by popularity, as Fiddler's paper does for comparison.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np
import torch

from baselines import latencies, popularity
from baselines.base import Setting
from baselines.layered import LayeredSystem
from baselines.tiers import MappedTier, PinnedTier
from flashmoe.errors import FlashMoEError
from flashmoe.memory.host_arena import HostArena
from flashmoe.quant import Parameters
from flashmoe.store.manifest import Manifest

PINNED_SHARE = 0.5
RANDOM = "random"
_SEED = 0


class PinningSystem(LayeredSystem):
    """Pins the experts of its choice; the others it computes mapped, or copied first."""

    pinned_what: ClassVar[str]  # for the table's reader
    decoded_only: ClassVar[bool] = False  # popularity counts only tokens that were decoded

    def __init__(self, pinned_share: float = PINNED_SHARE, random: bool = False) -> None:
        """pinned_share: of the budget. random: pin by chance, without a profile."""
        self.pinned_share = pinned_share
        self.random = random
        what = "experts at random" if random else self.pinned_what
        self.residency = (
            f"{pinned_share:.0%} of the budget: {what}; the others memory-mapped; the rest in DRAM"
        )

    @classmethod
    def options(cls, argument: str) -> dict[str, object]:
        share, comma, pins = argument.partition(",")
        try:
            pinned_share = float(share)
        except ValueError:
            pinned_share = 0.0
        if not 0 < pinned_share <= 1 or pins != RANDOM * bool(comma):
            raise FlashMoEError(
                f"system {cls.name}: {argument!r} is no share of the budget to pin; write "
                f"{cls.name}:0.25 or {cls.name}:0.25,{RANDOM}"
            )
        return {"pinned_share": pinned_share, "random": bool(comma)}

    @abstractmethod
    def choose(self, uses: np.ndarray, room: int) -> list[list[int]]:
        """Which `room` experts to pin, by layer; uses [layers, experts]."""

    def prepare(self, setting: Setting) -> None:
        n = room(self.manifest, setting.memory_bytes, self.pinned_share)
        pinned = self.choose(self.uses(setting), n)
        self.mapped = MappedTier(setting.store, self.manifest)
        self.pinned = PinnedTier(setting.store, self.manifest, pinned)
        self.staging = HostArena(self.manifest.layers[0], 1)
        width = self.model.config.get_text_config().hidden_size
        self.latencies = latencies.measure(
            self.modules[0],
            self.mapped.parameters(0, 0),
            lambda: self.copy(0, 0),
            torch.ones(1, width, dtype=self.model.dtype),
        )

    def uses(self, setting: Setting) -> np.ndarray:
        """How popular each expert is, [layers, experts]."""
        if self.random:
            return popularity.by_chance(popularity.shape(self.manifest), _SEED)
        return popularity.counts(setting.profile, self.manifest, self.decoded_only)

    def copy(self, layer: int, expert: int) -> Parameters:
        """The expert's parameters, copied to the pinned tier's staging slot."""
        self.mapped.copy(layer, expert, self.staging.slots[0])
        return self.staging.parameters[0]

    def close(self) -> None:
        self.pinned.close()
        self.staging.close()


def room(manifest: Manifest, memory_bytes: int, pinned_share: float) -> int:
    """How many experts the pinned tier has room for, beside the slot for copies."""
    extent_bytes = max(layer.extent_bytes for layer in manifest.layers)
    n = int(memory_bytes * pinned_share) // extent_bytes - 1
    return max(0, min(n, sum(layer.n_experts for layer in manifest.layers)))
