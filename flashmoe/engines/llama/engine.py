"""The engine of one model in GGUF files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from flashmoe.engines.base import Engine
from flashmoe.engines.llama.arena import PlacedArena
from flashmoe.engines.llama.backend import GGUFExperts
from flashmoe.engines.llama.recorder import Recorder
from flashmoe.errors import FlashMoEError
from flashmoe.memory import free_memory
from flashmoe.residency import budget
from flashmoe.residency.at_once import AtOnce
from flashmoe.trace import Trace
from flashmoe.util.sizes import parse_bytes

# The program has its caches and buffers by then; some are not touched yet.
RESERVE_BYTES = 256 << 20


class LlamaEngine(Engine):
    """What a program of llama.cpp computes with, as far as it fits the budget."""

    def __init__(
        self, experts: GGUFExperts, memory: int | str, policy: str, beside_bytes: int = 0
    ) -> None:
        """memory: "auto" gives what is free now, less a reserve: the program has all else by then.

        beside_bytes: what it is still to touch of that, beyond the reserve.

        Raises FlashMoEError where the budget is too small.
        """
        cpu = torch.device("cpu")
        least = budget.least_bytes(experts.manifest, whole_events=True)
        automatic = memory == "auto"
        super().__init__(
            experts,
            free_memory.budget_bytes(beside_bytes, cpu, least, reserve_bytes=RESERVE_BYTES)
            if automatic
            else parse_bytes(memory),
            policy,
            PlacedArena,
            device=cpu,
            prefetch=False,
            check_reads=False,
            whole_events=True,
        )
        self.beside_bytes = beside_bytes
        self.experts = experts
        self._recorder: Recorder | None = None
        self.at_once = AtOnce(self.residency, experts.extent, experts.drop)

    def note(self, layer: int, rows: np.ndarray) -> None:
        """An event begins: `rows` [tokens, top_k] are what the layer chose.

        Raises FlashMoEError when the engine was closed, OSError when a file changed.
        """
        self._check_open()
        self.experts.check_unchanged()
        if self._recorder:
            self._recorder.note(layer, rows)

    def restore(self, path: Path) -> None:
        """Begin as an earlier run ended. Raises FlashMoEError for a file of another model."""
        self.at_once.restore(path)

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
        self.at_once.empty_all()

    def reset(self) -> None:
        super().reset()
        self.at_once.empty_all()
