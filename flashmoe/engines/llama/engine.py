"""The engine of one model in GGUF files."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from flashmoe.engines.base import Engine
from flashmoe.engines.llama.arena import PlacedArena
from flashmoe.engines.llama.backend import GGUFExperts
from flashmoe.engines.stats import Stats
from flashmoe.errors import FlashMoEError
from flashmoe.memory import free_memory
from flashmoe.residency import budget, warm_start
from flashmoe.residency.at_once import AtOnce
from flashmoe.util.sizes import format_bytes, parse_bytes

# The program has its caches and buffers by then; some are not touched yet.
RESERVE_BYTES = 256 << 20


class LlamaEngine(Engine):
    """What a program of llama.cpp computes with, as far as it fits the budget."""

    def __init__(self, experts: GGUFExperts, memory: int | str, policy: str) -> None:
        """memory: "auto" gives what is free now, less a reserve: the program has all else by then.

        Raises FlashMoEError where the budget is too small.
        """
        self.experts = experts
        super().__init__(
            experts,
            self._budget_bytes(memory),
            policy,
            partial(PlacedArena, experts),
            device="cpu",
            prefetch=True,
            check_reads=False,
            whole_events=True,
        )
        self.at_once = AtOnce(self.residency, experts)

    def _budget_bytes(self, memory: int | str) -> int:
        """What is left for whole places: the pages at their ends stay filled."""
        edge_bytes = self.experts.edge_bytes
        least = edge_bytes + budget.least_bytes(self.experts.manifest, whole_events=True)
        if memory == "auto":
            present = self.at_once.filled.bytes if hasattr(self, "at_once") else 0
            memory_bytes = free_memory.budget_bytes(
                0, "cpu", least, present, reserve_bytes=RESERVE_BYTES
            )
        elif (memory_bytes := parse_bytes(memory)) < least:
            raise FlashMoEError(
                f"memory={format_bytes(memory_bytes)} is too small: a prompt may need all experts "
                f"of a layer at once, which takes {format_bytes(least)} ({least} bytes) at least"
            )
        return memory_bytes - edge_bytes

    def restore(self, path: Path) -> None:
        """Begin as an earlier run ended. Raises FlashMoEError for a file of another model."""
        warm_start.restore(self.residency, path)
        self.at_once.take_stock()

    def resize(self, memory: int | str) -> None:
        super().resize(memory)
        self.at_once.take_stock()

    def reset(self) -> None:
        super().reset()
        self.at_once.take_stock()

    def snapshot(self) -> Stats:
        """resident_bytes: what is in memory, be it resident or a prompt's, or guessed."""
        with self.lock:
            filled = self.at_once.filled
            return replace(
                super().snapshot(),
                resident_bytes=filled.bytes,
                peak_resident_bytes=filled.most_bytes,
            )
