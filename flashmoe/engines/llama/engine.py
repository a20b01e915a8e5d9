"""The engine of one model in GGUF files."""

from __future__ import annotations

import torch

from flashmoe.engines.base import Engine
from flashmoe.engines.llama.arena import PlacedArena
from flashmoe.engines.llama.backend import GGUFExperts
from flashmoe.memory import free_memory
from flashmoe.residency import budget
from flashmoe.residency.at_once import AtOnce
from flashmoe.util.sizes import parse_bytes

# The program has its caches and buffers by then; some are not touched yet.
RESERVE_BYTES = 256 << 20


class LlamaEngine(Engine):
    """What a program of llama.cpp computes with, as far as it fits the budget."""

    def __init__(self, experts: GGUFExperts, memory: int | str, policy: str) -> None:
        """memory: "auto" gives what is free now, less a reserve: the program has all else by then.

        Raises FlashMoEError where the budget is too small.
        """
        cpu = torch.device("cpu")
        least = budget.least_bytes(experts.manifest, whole_events=True)
        automatic = memory == "auto"
        super().__init__(
            experts,
            free_memory.budget_bytes(0, cpu, least, reserve_bytes=RESERVE_BYTES)
            if automatic
            else parse_bytes(memory),
            policy,
            PlacedArena,
            device=cpu,
            prefetch=False,
            check_reads=False,
            whole_events=True,
        )
        self.experts = experts
        self.at_once = AtOnce(self.residency, experts.extent, experts.drop)

    def check_usable(self) -> None:
        """Raises FlashMoEError when the engine was closed, OSError when a file changed."""
        self._check_open()
        self.experts.check_unchanged()

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
