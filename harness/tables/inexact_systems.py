"""What a system that changes the model's output costs in quality, on the demo model."""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import baselines
import flashmoe
from baselines.base import Setting
from flashmoe import trace
from harness.runs.budget import budget_for

SLOTS = (16, 32)  # a layer, of 64
PROMPT_TOKENS, TOKENS = 32, 224


def table(store: Path) -> list[dict[str, Any]]:
    """Each inexact system against plain transformers: `store` holds the demo model.

    The text is a module of Python's standard library, which every machine has; the demo model
    was trained on most of that library, so its perplexity there is low. It is decoded token by
    token, since that is where such systems differ.
    """
    path = flashmoe.demo_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer(inspect.getsource(textwrap), return_tensors="pt")["input_ids"]
    ids = ids[:, : PROMPT_TOKENS + TOKENS]
    plain = _logits(AutoModelForCausalLM.from_pretrained(path, experts_implementation="eager"), ids)
    perplexity = _perplexity(plain, ids)
    profile = trace.load(flashmoe.demo_routing_path())
    rows = []
    for name, kind in baselines.available().items():
        for slots in SLOTS if not kind.exact else ():
            system = kind()
            model = system.load(Setting(path, store, budget_for(store, slots), profile))
            logits = _logits(model, ids)
            rows.append(
                {
                    "system": name,
                    "slots": slots,
                    "perplexity": _perplexity(logits, ids),
                    "perplexity_of_the_model": perplexity,
                    "tokens_differing": float(
                        (logits.argmax(-1) != plain.argmax(-1)).float().mean()
                    ),
                    "prediction_accuracy": system.stats().get("prediction_accuracy"),
                }
            )
            system.close()
    return rows


@torch.inference_mode()
def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """[TOKENS, vocabulary] for the tokens after the prompt, fed one at a time."""
    output = model(ids[:, :PROMPT_TOKENS], use_cache=True)
    steps = [output.logits[:, -1]]
    for position in range(PROMPT_TOKENS, ids.shape[1] - 1):
        output = model(
            ids[:, position : position + 1], past_key_values=output.past_key_values, use_cache=True
        )
        steps.append(output.logits[:, -1])
    return torch.cat(steps).float()


def _perplexity(logits: torch.Tensor, ids: torch.Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits, ids[0, PROMPT_TOKENS:]).exp())
