"""The hit-rate table: the shipped routing, replayed through the engine's cache code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from flashmoe import policies, simulate, trace
from flashmoe.trace import Trace

CAPACITIES = (0.125, 0.25, 0.375, 0.5, 0.75)
_RESAMPLES = 2000
_SEED = 20261124

CONDITIONS = {
    "cold": simulate.Conditions(),
    "one stream": simulate.Conditions(warm=True),
}


def of_kind(whole: Trace, kind: str) -> Trace:
    """The sequences of one kind of text ("all" for every one), by the names in the trace."""
    if kind == "all":
        return whole
    names = whole.info["names"]
    numbers = [number for number, name in enumerate(names) if name.rsplit("-", 1)[0] == kind]
    chosen = np.isin(whole.sequence, numbers)
    return replace(
        whole,
        experts=whole.experts[chosen],
        sequence=whole.sequence[chosen],
        weights=None,
        probabilities=None,
        step=None,
    )


def kinds(whole: Trace) -> list[str]:
    return ["all", *sorted({name.rsplit("-", 1)[0] for name in whole.info["names"]})]


def interval(per_sequence: tuple[tuple[int, int], ...]) -> tuple[float, float]:
    """Bootstrap 95 % interval of the hit rate, sequences resampled."""
    counts = np.array(per_sequence, dtype=float)
    rng = np.random.default_rng(_SEED)
    picks = rng.integers(0, len(counts), (_RESAMPLES, len(counts)))
    sums = counts[picks].sum(axis=1)
    low, high = np.percentile(sums[:, 1] / sums[:, 0], [2.5, 97.5])
    return float(low), float(high)


def table(path: Path, expert_bytes: int, advance: Callable[[int], object]) -> list[dict[str, Any]]:
    """One row a kind of text, start, capacity and policy."""
    whole = trace.load(path)
    rows = []
    for kind in kinds(whole):
        part = of_kind(whole, kind)
        for start, conditions in CONDITIONS.items():
            if start != "cold" and kind != "all":
                continue
            for capacity in CAPACITIES:
                outcomes = {
                    name: simulate.replay(part, name, capacity, conditions, progress=advance)
                    for name in policies.available()
                }
                lru, best = outcomes["lru"].hit_rate, outcomes["belady"].hit_rate
                lfu, gap = outcomes["lfu"].hit_rate, best - lru
                for name, outcome in outcomes.items():
                    rate = outcome.hit_rate
                    low, high = interval(outcome.per_sequence)
                    misses = outcome.requests - outcome.hits
                    per_token = misses / len(part.experts)
                    rows.append(
                        {
                            "text": kind,
                            "start": start,
                            "capacity": capacity,
                            "slots": outcome.slots,
                            "policy": name,
                            "hit_rate": round(rate, 5),
                            "low": round(low, 5),
                            "high": round(high, 5),
                            "misses_per_token": round(per_token, 3),
                            "bytes_per_token": round(per_token * expert_bytes),
                            "gap_closed": round((rate - lru) / gap, 4) if gap else None,
                            "over_lru": round(rate / lru - 1, 4),
                            "over_lfu": round(rate / lfu - 1, 4),
                            "requests": outcome.requests,
                            "hits": outcome.hits,
                            "sequences": len(outcome.per_sequence),
                        }
                    )
    return rows


def total_events(path: Path) -> int:
    """Token-layers that `table` replays, for its progress bar."""
    whole = trace.load(path)
    tokens = sum(len(of_kind(whole, kind).experts) for kind in kinds(whole)) + len(whole.experts)
    return tokens * whole.n_layers * len(CAPACITIES) * len(policies.available())
