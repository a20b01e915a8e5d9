"""The engine of one model in GGUF files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from flashmoe.engines.base import Engine
from flashmoe.engines.llama import layout
from flashmoe.engines.llama.arena import PlacedArena
from flashmoe.engines.llama.backend import GGUFExperts
from flashmoe.engines.llama.recorder import Recorder
from flashmoe.engines.stats import Stats
from flashmoe.errors import FlashMoEError
from flashmoe.memory import free_memory
from flashmoe.reading.range_reader import RangeReader
from flashmoe.residency import warm_start
from flashmoe.residency.at_once import AtOnce
from flashmoe.trace import Trace

# The program has its caches and buffers by then; some are not touched yet.
RESERVE_BYTES = 256 << 20


class LlamaEngine(Engine):
    """What a program of llama.cpp computes with, as far as it fits the budget."""

    def __init__(
        self,
        experts: GGUFExperts,
        memory: int | str,
        policy: str,
        beside_bytes: int = 0,
        *,
        prefetch: bool = True,
    ) -> None:
        """memory: "auto" gives what is free now, less a reserve: the program has all else by then.

        beside_bytes: what it is still to touch of that, beyond the reserve.

        Raises FlashMoEError where the budget is too small.
        """
        self.experts = experts
        self.beside_bytes = beside_bytes
        reader = RangeReader(experts)
        super().__init__(
            reader,
            self._places_bytes(memory, 0),
            policy,
            PlacedArena,
            device="cpu",
            prefetch=prefetch,
            whole_events=True,
        )
        self._recorder: Recorder | None = None
        self.at_once = AtOnce(self.residency, experts, reader)

    def _budget_bytes(self, memory: int | str) -> int:
        return self._places_bytes(memory, self.at_once.filled.bytes)

    def _places_bytes(self, memory: int | str, present_bytes: int) -> int:
        """What is left of `memory` for whole places: the pages at their ends stay filled.

        present_bytes: what whole places take now.
        """
        manifest, edge_bytes = self.experts.manifest, self.experts.edge_bytes
        if memory != "auto":
            return layout.check_budget(memory, manifest, edge_bytes) - edge_bytes
        least = layout.least_bytes(manifest, edge_bytes)
        memory_bytes = free_memory.budget_bytes(
            self.beside_bytes, "cpu", least, present_bytes, reserve_bytes=RESERVE_BYTES
        )
        return memory_bytes - edge_bytes

    def restore(self, path: Path) -> None:
        """Begin as an earlier run ended. Raises FlashMoEError for a file of another model."""
        warm_start.restore(self.residency, path)
        self.at_once.take_restored()

    def note(self, layer: int, rows: np.ndarray) -> None:
        """An event begins: `rows` [tokens, top_k] are what the layer chose.

        Raises FlashMoEError when the engine was closed, OSError when a file changed.
        """
        self._check_open()
        if layer == 0:  # what is read later is checked when it was
            self.experts.check_unchanged()
        if self._recorder:
            self._recorder.note(layer, rows)

    def record(self) -> Recorder:
        """Record which experts are chosen, from now on and from nothing."""
        self._recorder = Recorder(self.manifest)
        return self._recorder

    def trace(self, **info: object) -> Trace:
        """What was recorded, and how to replay it to the same hits (see docs/llama.md).

        info: what else to say of it in the file. Raises FlashMoEError where nothing was recorded.
        """
        if self._recorder is None:
            raise FlashMoEError("no trace: call record() before what is to be recorded")
        stats = self.snapshot()
        counts = {"policy": stats.policy, "slots": stats.slots_per_layer}
        counts |= {"requests": stats.requests, "hits": stats.hits}
        return self._recorder.trace({"model": self.path.name} | counts | info)

    def close(self) -> None:
        """Free slots, threads and descriptors; not during generation. The model fails afterwards.

        What is not of experts stays until the model itself is gone.
        """
        with self.lock:
            super().close()
            for file in self.experts.files:
                file.drop_experts()

    def resize(self, memory: int | str) -> None:
        super().resize(memory)
        self.at_once.trim()

    def reset(self) -> None:
        super().reset()
        self.at_once.trim()

    def snapshot(self) -> Stats:
        """resident_bytes: what is in memory, be it resident or a prompt's, or guessed."""
        with self.lock:
            filled = self.at_once.filled
            return replace(
                super().snapshot(),
                resident_bytes=filled.bytes,
                peak_resident_bytes=filled.most_bytes,
            )
