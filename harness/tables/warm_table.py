"""What beginning with the experts of the last run is worth, on the demo model."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import flashmoe
from flashmoe.residency import warm_start
from harness.demo.prompts import PROMPTS
from harness.runs.budget import budget_for
from harness.tables import text_table

SLOTS = 24
TOKENS = 100
FIRST_PROMPTS = {  # of the run before; the one that is measured has PROMPTS
    "bible": "Now these are the names of the children of",
    "german-manual": "Die folgenden Dateien werden",
    "python": "class Parser:\n    def __init__(self",
}


class _Marks(BaseStreamer):
    """Notes the hit rate of the first token decoded, and of all, the prompt's left out."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.engine = model.flashmoe
        self.calls = 0
        self.first = 0.0

    def put(self, value: torch.Tensor) -> None:
        self.calls += 1
        if self.calls == 2:  # the prompt, then the token that prefill gave
            self.engine.reset_counts()
        elif self.calls == 3:
            self.first = self.engine.stats()["hit_rate"]

    def end(self) -> None:
        self.all = self.engine.stats()["hit_rate"]


def table(store: Path) -> list[dict[str, Any]]:
    """A row a kind of text. `store` holds the demo model."""
    tokenizer = AutoTokenizer.from_pretrained(flashmoe.demo_path())
    rows = []
    with TemporaryDirectory() as work:
        for kind, first in FIRST_PROMPTS.items():
            state_path = Path(work) / f"{kind}.npz"
            row: dict[str, Any] = {"kind": kind}
            for start in ("before", "cold", "warm"):
                model = flashmoe.load(store, memory=budget_for(store, SLOTS))
                if start == "warm":
                    row["restored"] = warm_start.restore(model.flashmoe.residency, state_path)
                prompt = first if start == "before" else PROMPTS[kind]
                marks = _generate(model, tokenizer(prompt, return_tensors="pt")["input_ids"])
                if start == "before":
                    warm_start.save(model.flashmoe.residency, state_path)
                else:
                    row[f"first_token_{start}"] = marks.first
                    row[f"first_{TOKENS}_{start}"] = marks.all
                model.flashmoe.close()
            rows.append(row)
    return rows


def _generate(model: PreTrainedModel, ids: torch.Tensor) -> _Marks:
    marks = _Marks(model)
    text_table.greedy(model, ids, TOKENS, marks)
    return marks
