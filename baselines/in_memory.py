"""No cap, everything resident, plain transformers: the ceiling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from baselines.base import System


class InMemory(System):
    """`from_pretrained` with transformers' eager experts, which FlashMoE's output must equal."""

    name = "in-memory"
    residency = "everything in DRAM"
    uses_budget = False

    def load(self, checkpoint: Path, store: Path, memory_bytes: int) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, experts_implementation="eager")
        # transformers maps the file; a copy makes the pages this process's own
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        return model

    def reset_counts(self) -> None:
        pass

    def stats(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass
