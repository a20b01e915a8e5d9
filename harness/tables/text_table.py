"""Real text from the streamed demo model at several budgets, beside the resident model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import flashmoe
from harness.demo.prompts import PROMPTS
from harness.runs.budget import budget_for

SLOTS = (8, 24)
NEW_TOKENS = 48


def table(store: Path) -> list[dict[str, Any]]:
    """One row a kind of text; the engine starts cold for each. `store` holds the demo model."""
    path = flashmoe.demo_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompts = {k: tokenizer(p, return_tensors="pt")["input_ids"] for k, p in PROMPTS.items()}
    resident = AutoModelForCausalLM.from_pretrained(path, experts_implementation="eager")
    expected = {kind: greedy(resident, ids, NEW_TOKENS) for kind, ids in prompts.items()}
    rows: dict[str, dict[str, Any]] = {
        kind: {"kind": kind, "same_output": True} for kind in prompts
    }
    for slots in SLOTS:
        model = flashmoe.load(store, memory=budget_for(store, slots), policy="learned")
        try:
            for kind, ids in prompts.items():
                model.flashmoe.reset()
                if not torch.equal(greedy(model, ids, NEW_TOKENS), expected[kind]):
                    rows[kind]["same_output"] = False
                rows[kind][f"hit_rate_{slots}_slots"] = model.flashmoe.stats()["hit_rate"]
        finally:
            model.flashmoe.close()
    for kind, row in rows.items():
        row["text"] = tokenizer.decode(expected[kind])
    return list(rows.values())


def greedy(
    model: PreTrainedModel, ids: torch.Tensor, tokens: int, streamer: BaseStreamer | None = None
) -> torch.Tensor:
    """The prompt [1, n] and just so many `tokens` after it, [n + tokens]."""
    mask = torch.ones_like(ids)
    output = model.generate(
        ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
        streamer=streamer,
    )  # fmt: skip
    return output[0]
