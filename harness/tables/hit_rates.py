"""The hit-rate tables: recorded routing, replayed through the engine's cache code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import flashmoe
from flashmoe import policies, trace
from flashmoe.cache.replays import ReplayJob, replay_all
from flashmoe.cache.simulate import Conditions, Replay
from flashmoe.engines.transformers.checkpoints import backends
from flashmoe.errors import FlashMoEError
from flashmoe.trace import Trace
from flashmoe.train.shipped_routing import shipped
from harness.tables import data_splits

CAPACITIES = (0.125, 0.25, 0.375, 0.5, 0.75)
OTHER_CAPACITIES = (0.25, 0.5)  # of conditions other than cold: fewer, so that it takes minutes
PROMPT_TOKENS = 64  # of the traces, none says which of its tokens were a prompt
CONDITIONS = {
    "cold": Conditions(),
    "one stream": Conditions(warm=True),
    "8 interleaved": Conditions(warm=True, interleaved=8),
    "cold, sequential": Conditions(sequential=True),
    "cold, decode only": Conditions(decode_only=True, prompt_tokens=PROMPT_TOKENS),
}
OTHERS = ("lfu-decay:64",)  # beside every policy of the registry
PAPER = "flashmoe-paper"  # its networks belong to a model: it has tables of its own
MOST_SEQUENCES = 30  # of a trace given from outside
_RESAMPLES = 1000
SEED = 20261124


# Whose routing is replayed with real models': the demo, and small models of their geometry.
STAND_INS = ("demo", "deepseek-v2-lite", "gpt-oss-20b", "mixtral-8x7b", "qwen3-30b-a3b")


@dataclass(frozen=True)
class Case:
    """Some sequences of a trace."""

    trace: str
    part: str  # of harness/tables/data_splits.py, or "unseen model"
    routing: Trace
    expert_bytes: int | None  # bf16, None where the model's shapes are not known
    starts: tuple[str, ...] = tuple(CONDITIONS)

    def has(self, start: str, capacity: float) -> bool:
        if start == "cold":
            return True
        several = len(self.routing.names()) > 1
        return start in self.starts and capacity in OTHER_CAPACITIES and several


def labels() -> list[str]:
    """The policies of the table, in order."""
    names = {*policies.available(), *OTHERS}
    return sorted(names - {PAPER})


def demo_expert_bytes() -> int:
    """Of one expert in bf16."""
    backend = backends.open_path(flashmoe.demo_path())
    backend.close()
    return backend.manifest.layers[0].extent_bytes


def shipped_cases(expert_bytes: int, names: Sequence[str] = ("demo",)) -> list[Case]:
    """Held-out routing that the package ships; `expert_bytes` are the demo model's."""
    cases = []
    for name, whole in shipped():
        if name in names:
            size = expert_bytes if name == "demo" else None
            starts = tuple(CONDITIONS) if name == "demo" else ("cold",)
            for part in (data_splits.SEEN_DOMAIN, data_splits.UNSEEN_DOMAIN):
                label = name if name == "demo" else f"{name} stand-in"
                cases.append(Case(label, part, data_splits.take(whole, part), size, starts))
    return cases


def outside_cases(folder: Path) -> list[Case]:
    """Traces of `folder`: unseen subjects where sequences are named so, else every n-th one.

    Raises FlashMoEError where there is none.
    """
    paths = sorted(folder.glob("*.npz"))
    if not paths:
        raise FlashMoEError(f"{folder} holds no trace (*.npz)")
    cases = []
    for path in paths:
        whole = trace.load(path)
        named = all(name.count("/") == 2 for name in whole.names())
        part = data_splits.take(whole, data_splits.UNSEEN_DOMAIN) if named else whole
        count = len(part.names())
        step = -(-count // MOST_SEQUENCES)
        label = data_splits.UNSEEN_DOMAIN if named else "unseen model"
        cases.append(Case(path.stem, label, part.select(range(0, count, step)), _bytes_of(path)))
    return cases


def _bytes_of(path: Path) -> int | None:
    """Of one bf16 expert, for real models whose shapes we know."""
    sizes = {"gpt-oss-20b": 3 * 2880 * 2880 * 2, "deepseek-v2-lite": 3 * 2048 * 1408 * 2}
    return next((size for name, size in sizes.items() if path.stem.startswith(name)), None)


def table(
    cases: Sequence[Case],
    advance: Callable[[int], object],
    conditions: Sequence[str] = tuple(CONDITIONS),
    capacities: Sequence[float] = CAPACITIES,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A row a case, condition, capacity and policy; and, cold, one a layer of each."""
    parts = list(_parts(cases, conditions, capacities))
    jobs = (
        ReplayJob(case.routing, name, capacity, CONDITIONS[start])
        for case, start, capacity in parts
        for name in labels()
    )
    replays = iter(list(replay_all(jobs, advance)))
    rows, layers = [], []
    for case, start, capacity in parts:
        outcomes = {name: next(replays) for name in labels()}
        columns: dict[str, Any] = {"trace": case.trace, "part": case.part}
        columns |= {"start": start, "capacity": capacity}
        rows += [columns | row for row in _rows(outcomes, case)]
        if start == "cold":
            layers += [columns | row for row in _layers(outcomes)]
    return rows, layers


def _rows(outcomes: dict[str, Replay], case: Case) -> Iterator[dict[str, Any]]:
    """A row a policy. Intervals are over streams, resampled alike for every policy."""
    counts = {name: outcome.per_stream for name, outcome in outcomes.items()}
    streams = len(counts["lru"])
    picks = np.random.default_rng(SEED).integers(0, streams, (_RESAMPLES, streams))
    sampled = {}
    for name, count in counts.items():
        sums = count[picks].sum(axis=1)
        sampled[name] = sums[:, 1] / sums[:, 0]
    rates = {name: outcome.hit_rate for name, outcome in outcomes.items()}
    gap = rates["belady"] - rates["lru"]
    for name, outcome in outcomes.items():
        low, high = np.percentile(sampled[name], [2.5, 97.5])
        tokens = outcome.requests / (case.routing.n_layers * case.routing.top_k)  # that count
        misses = (outcome.requests - outcome.hits) / tokens
        row = {
            "slots": outcome.slots,
            "policy": name,
            "hit_rate": round(rates[name], 5),
            "low": round(float(low), 5),
            "high": round(float(high), 5),
            "misses_per_token": round(misses, 3),
            "bytes_per_token": None,
            "gap_closed": None,
            "gap_low": None,
            "gap_high": None,
            "over_lru": round(rates[name] / rates["lru"] - 1, 4),
            "over_lfu": round(rates[name] / rates["lfu"] - 1, 4),
            "over_lru_low": round(float(np.percentile(sampled[name] / sampled["lru"] - 1, 2.5)), 4),
            "microseconds": 1e6 * outcome.policy_seconds / (tokens * case.routing.n_layers),
            "requests": outcome.requests,
            "hits": outcome.hits,
            "sequences": len(case.routing.names()),
            "streams": streams,
        }
        if case.expert_bytes:
            row["bytes_per_token"] = round(misses * case.expert_bytes)
        if gap > 0:
            spans = sampled["belady"] - sampled["lru"]
            closed = (sampled[name] - sampled["lru"]) / np.where(spans > 0, spans, np.nan)
            row["gap_closed"] = round((rates[name] - rates["lru"]) / gap, 4)
            if np.isfinite(closed).any():
                row["gap_low"], row["gap_high"] = (
                    round(float(x), 4) for x in np.nanpercentile(closed, [2.5, 97.5])
                )
        yield row


def _layers(outcomes: dict[str, Replay]) -> Iterator[dict[str, Any]]:
    """Per layer, the gap that `learned` closes."""
    rates = {}
    for name in ("lru", "learned", "belady"):
        counts = outcomes[name].counted.sum(axis=1)
        rates[name] = counts[:, 1] / counts[:, 0]
    for layer, (lru, ours, belady) in enumerate(zip(*rates.values(), strict=True)):
        closed = (ours - lru) / (belady - lru) if belady > lru else None
        yield {
            "layer": layer,
            "lru": round(float(lru), 5),
            "learned": round(float(ours), 5),
            "belady": round(float(belady), 5),
            "gap_closed": None if closed is None else round(float(closed), 4),
        }


def total_events(
    cases: Sequence[Case],
    conditions: Sequence[str] = tuple(CONDITIONS),
    capacities: Sequence[float] = CAPACITIES,
) -> int:
    """Token-layers that `table` replays, for its progress bar."""
    return sum(
        case.routing.experts[..., 0].size * len(labels())
        for case, start, capacity in _parts(cases, conditions, capacities)
    )


def _parts(
    cases: Sequence[Case], conditions: Sequence[str], capacities: Sequence[float]
) -> Iterator[tuple[Case, str, float]]:
    """What the table has rows of, in order."""
    for case in cases:
        for start in conditions:
            for capacity in capacities:
                if case.has(start, capacity):
                    yield case, start, capacity
