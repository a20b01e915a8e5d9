"""The places of experts in somebody else's memory, and which of them are filled."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from flashmoe.store.manifest import Manifest

Expert = tuple[int, int]  # layer, expert


class Places(ABC):
    """Each expert's own place, which takes memory once it was filled."""

    @abstractmethod
    def drop(self, layer: int, expert: int) -> None:
        """Give back the memory of a place; it reads as zeros."""

    @abstractmethod
    def move(self, source: Expert, target: Expert) -> None:
        """The memory of one expert's place becomes that of another, as far as that needs it."""


class FilledPlaces:
    """Which places are filled, or about to be, within a budget of bytes."""

    def __init__(self, manifest: Manifest, places: Places, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.bytes = self.most_bytes = 0
        self.of: list[dict[int, None]] = [{} for _ in manifest.layers]  # by layer, oldest first
        self._places = places
        self._extent_bytes = [layer.extent_bytes for layer in manifest.layers]

    def fill(self, layer: int, experts: list[int], victims: Iterator[Expert]) -> list[int]:
        """Make room for `experts`; those that there is room for.

        victims: whose places may be emptied, the first one first. One hands its memory on, so that
        no page has to be freed and cleared again.
        """
        extent_bytes = self._extent_bytes[layer]
        for number, expert in enumerate(experts):
            giver = None
            while self.bytes + extent_bytes > self.limit_bytes:
                if (victim := next(victims, None)) is None:
                    if giver is not None:  # too small alone
                        self._places.drop(*giver)
                    return experts[:number]
                if giver is None:
                    giver = victim
                    self._forget(*victim)
                else:
                    self.empty(*victim)
            if giver is not None:
                self._places.move(giver, (layer, expert))
            self.of[layer][expert] = None
            self.bytes += extent_bytes
            self.most_bytes = max(self.most_bytes, self.bytes)
        return experts

    def empty(self, layer: int, expert: int) -> None:
        """Give back a place's memory, if it is filled."""
        if expert in self.of[layer]:
            self._forget(layer, expert)
            self._places.drop(layer, expert)

    def take(self, layer: int, experts: list[int]) -> None:
        """These were filled by somebody else."""
        for expert in experts:
            if expert not in self.of[layer]:
                self.of[layer][expert] = None
                self.bytes += self._extent_bytes[layer]

    def _forget(self, layer: int, expert: int) -> None:
        del self.of[layer][expert]
        self.bytes -= self._extent_bytes[layer]
