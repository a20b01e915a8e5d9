"""The hit-rate table: the shipped routing, replayed through the engine's cache code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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


def kinds(whole: Trace) -> dict[str, list[int]]:
    """The sequences of each kind of text, by position; "all" is every one.

    A sequence's name in the trace is its kind, a dash and a number.
    """
    found: dict[str, list[int]] = {"all": []}
    for position, (number, _) in enumerate(whole.sequences()):
        kind = whole.info["names"][number].rsplit("-", 1)[0]
        found["all"].append(position)
        found.setdefault(kind, []).append(position)
    return dict(sorted(found.items()))


def interval(per_sequence: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """Bootstrap 95 % interval of the hit rate, sequences resampled."""
    counts = np.array(per_sequence, dtype=float)
    rng = np.random.default_rng(_SEED)
    picks = rng.integers(0, len(counts), (_RESAMPLES, len(counts)))
    sums = counts[picks].sum(axis=1)
    low, high = np.percentile(sums[:, 1] / sums[:, 0], [2.5, 97.5])
    return float(low), float(high)


def table(path: Path, expert_bytes: int, advance: Callable[[int], object]) -> list[dict[str, Any]]:
    """One row a kind of text, start, capacity and policy.

    Sequences that start cold do not know of each other, so one replay serves every kind.
    """
    whole = trace.load(path)
    tokens = np.array([run.stop - run.start for _, run in whole.sequences()])
    rows = []
    for start, conditions in CONDITIONS.items():
        for capacity in CAPACITIES:
            outcomes = {
                name: simulate.replay(whole, name, capacity, conditions, progress=advance)
                for name in policies.available()
            }
            for kind, positions in kinds(whole).items():
                if start == "cold" or kind == "all":
                    given = {"text": kind, "start": start, "capacity": capacity}
                    count = int(tokens[positions].sum())
                    for row in _rows(outcomes, positions, count, expert_bytes):
                        rows.append(given | row)
    return sorted(rows, key=lambda row: (row["text"], row["start"]))


def _rows(
    outcomes: dict[str, simulate.Replay], positions: list[int], tokens: int, expert_bytes: int
) -> Iterator[dict[str, Any]]:
    """A row a policy, over some of the sequences."""
    counts = {name: [o.per_sequence[p] for p in positions] for name, o in outcomes.items()}
    requests = {name: sum(requests for requests, _ in c) for name, c in counts.items()}
    hits = {name: sum(hits for _, hits in c) for name, c in counts.items()}
    rates = {name: hits[name] / requests[name] for name in outcomes}
    gap = rates["belady"] - rates["lru"]
    for name, rate in rates.items():
        low, high = interval(counts[name])
        per_token = (requests[name] - hits[name]) / tokens
        yield {
            "slots": outcomes[name].slots,
            "policy": name,
            "hit_rate": round(rate, 5),
            "low": round(low, 5),
            "high": round(high, 5),
            "misses_per_token": round(per_token, 3),
            "bytes_per_token": round(per_token * expert_bytes),
            "gap_closed": round((rate - rates["lru"]) / gap, 4) if gap else None,
            "over_lru": round(rate / rates["lru"] - 1, 4),
            "over_lfu": round(rate / rates["lfu"] - 1, 4),
            "requests": requests[name],
            "hits": hits[name],
            "sequences": len(positions),
        }


def total_events(path: Path) -> int:
    """Token-layers that `table` replays, for its progress bar."""
    whole = trace.load(path)
    replays = len(CONDITIONS) * len(CAPACITIES) * len(policies.available())
    return len(whole.experts) * whole.n_layers * replays
