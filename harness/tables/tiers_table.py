"""How much of its memory Fiddler pins, and what popularity is worth beside chance."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

import flashmoe
from baselines import popularity
from baselines.pinning import RANDOM, room
from flashmoe.store import manifest as manifests
from flashmoe.trace import Trace
from flashmoe.train.shipped_routing import shipped
from harness.progress import Say
from harness.runs import disturbance
from harness.runs.budget import budget_for
from harness.runs.disturbance import Repeater
from harness.runs.job import Job
from harness.tables import speedups
from harness.tables.hit_rates import PROMPT_TOKENS, STAND_INS

TITLE = "tiers"
POPULAR = "popular"
PAPER_SHARES = (56 / 256, 125 / 256)  # of Mixtral's experts, on the paper's two machines
SHARES = (0.25, 0.5, 0.75, 0.9)  # of the budget
SEEDS = 20
SLOTS = 32  # a layer, of 64
TOKENS, ROUNDS = 32, 2
PROMPT = inspect.getsource(textwrap)[:600]
# Of a measured row, beside its name, hit rate and prediction accuracy.
_SPEEDS = (
    "tokens_per_second", "tokens_per_second_min", "tokens_per_second_max", "first_token_seconds",
    "load_seconds", "tokens_differing", "rounds",
)  # fmt: skip


class HitRates(NamedTuple):
    """Shares of requests that find their expert pinned."""

    per_token: float  # each token's choice is a request: the original's count
    per_event: float  # a prompt requests each of its experts once


def table(store: Path, say: Say) -> list[dict[str, Any]]:
    """Replayed rows of every shipped trace of a model, then measured ones of the demo model.

    store: holds the demo model.
    """
    traces = {name: trace for name, trace in shipped() if name in STAND_INS}
    rows = []
    for name, trace in traces.items():
        label = name if name == "demo" else f"{name} stand-in"
        experts = trace.n_layers * trace.n_experts
        for share in PAPER_SHARES:
            for pins in (POPULAR, RANDOM):
                row = {"trace": label, "system": "fiddler", "pins": pins}
                rows.append(row | replayed(trace, round(share * experts), pins))
    return rows + _measured(store, traces["demo"], say)


def replayed(trace: Trace, n_pinned: int, pins: str) -> dict[str, Any]:
    """Columns of a fixed choice of experts: at random, the mean and range of some seeds."""
    uses = sequence_uses(trace)
    choices = range(SEEDS) if pins == RANDOM else (None,)
    rates = [hit_rates(uses, n_pinned, seed) for seed in choices]
    per_token = [rate.per_token for rate in rates]
    experts = trace.n_layers * trace.n_experts
    return {
        "pinned": n_pinned,
        "experts": experts,
        "pinned_share": n_pinned / experts,
        "hit_rate_per_token": fmean(per_token),
        "hit_rate_per_token_min": min(per_token),
        "hit_rate_per_token_max": max(per_token),
        "hit_rate_per_event": fmean(rate.per_event for rate in rates),
        "seeds": len(rates),
    }


def sequence_uses(trace: Trace, prompt_tokens: int = PROMPT_TOKENS) -> np.ndarray:
    """Uses of each expert, [sequences, prompt and decode, layers, experts]."""
    parts = []
    for position in range(len(trace.names())):
        sequence = trace.select([position])
        prompt = sequence.first(prompt_tokens).uses()
        parts.append((prompt, sequence.uses() - prompt))
    return np.array(parts)


def hit_rates(uses: np.ndarray, n_pinned: int, seed: int | None) -> HitRates:
    """Of all sequences; `uses` as `sequence_uses` gives them.

    seed: pins by chance. None: pins what is popular in the other sequences than the one replayed.
    A sequence is a prompt, in one event, then one event a token.
    """
    everything = uses.sum(axis=(0, 1))
    tokens, events = np.zeros(2), np.zeros(2)  # requests and hits
    for prompt, decoded in uses:
        if seed is None:
            popular = everything - prompt - decoded
        else:
            popular = popularity.by_chance(prompt.shape, seed)
        held = np.zeros(prompt.shape, bool)
        for layer, experts in enumerate(popularity.most_popular(popular, n_pinned)):
            held[layer, experts] = True
        for counted, requests in ((tokens, prompt + decoded), (events, (prompt > 0) + decoded)):
            counted += requests.sum(), requests[held].sum()
    return HitRates(float(tokens[1] / tokens[0]), float(events[1] / events[0]))


def labels(shares: Sequence[float]) -> list[str]:
    """The systems that are measured."""
    popular = [f"fiddler:{share:g}" for share in shares]
    at_random = [f"{label},{RANDOM}" for label in popular]
    return ["flashmoe", *popular, *at_random, *(f"daop:{share:g}" for share in shares)]


def _measured(store: Path, trace: Trace, say: Say) -> list[dict[str, Any]]:
    """Every system on the demo model with the same budget, interleaved over the rounds."""
    manifest = manifests.load(store)
    memory_bytes = budget_for(store, SLOTS)
    base = Job("", flashmoe.demo_path(), store, memory_bytes, PROMPT, TOKENS)
    base = replace(base, routing=flashmoe.demo_routing_path())
    jobs = [replace(base, system=label) for label in labels(SHARES)]
    repeater = Repeater(disturbance.QUICK_AGAIN_SECONDS, say)
    runs = speedups.table(jobs, ROUNDS, None, say, repeater)
    rows = []
    for run in runs:
        name, colon, argument = run["system"].partition(":")
        share, _, pins = argument.partition(",")
        row: dict[str, Any] = {"trace": "demo", "system": name, "memory_bytes": memory_bytes}
        if colon:
            n_pinned = room(manifest, memory_bytes, float(share))
            row |= {"of_memory": float(share), "pins": pins or POPULAR}
            if name == "fiddler":  # what daop pins follows the prompt
                row |= replayed(trace, n_pinned, pins or POPULAR)
            else:
                experts = trace.n_layers * trace.n_experts
                row |= {"pinned": n_pinned, "experts": experts, "pinned_share": n_pinned / experts}
        row |= {"decode_hit_rate": run["hit_rate"]} | {speed: run[speed] for speed in _SPEEDS}
        rows.append(row | {"prediction_accuracy": run["prediction_accuracy"]})
    return rows
