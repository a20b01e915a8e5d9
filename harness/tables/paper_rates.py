"""Hit rates of the paper's baselines and of its policy, under conditions that may be its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flashmoe.cache.replays import ReplayJob, replay_all
from flashmoe.cache.simulate import Conditions, Replay
from harness.tables import paper_networks
from harness.tables.paper_networks import REPLAYS, SEED, Routing

SLOTS = (8, 16, 24, 32)  # a layer, as in the paper's figures
POLICIES = ("lru", "lfu", "lfu-in-cache", "lifo", "arc", "lecar", "learned", "belady")
PROMPT_TOKENS = 64  # of the traces, none says which of its tokens were a prompt
COUNTED = ("all tokens", "decode only")
_RESAMPLES = 1000

Part = tuple[Routing, str, str, int]  # routing, replay, what is counted, slots


def conditions_of(replay: str, counted: str) -> Conditions:
    """Every sequence starts cold in a cache a layer, and what is read is kept, as in the paper."""
    prompt = PROMPT_TOKENS if counted == "decode only" else None
    return Conditions(
        bypass=False,
        sequential=replay == "sequential",
        decode_only=prompt is not None,
        prompt_tokens=prompt,
    )


def table(
    routings: Sequence[Routing], networks: Path, advance: Callable[[int], object]
) -> list[dict[str, Any]]:
    """A row a trace, condition, number of slots and policy. `networks` has the trained ones."""
    parts = list(_parts(routings))
    replays = iter(list(replay_all(_jobs(parts, networks), advance)))
    rows: list[dict[str, Any]] = []
    for part in parts:
        names = [name for name, _ in _policies(part, networks)]
        rows += _rows(part, {name: next(replays) for name in names})
    return rows


def total_events(routings: Sequence[Routing], networks: Path) -> int:
    """Token-layers that `table` replays, for its progress bar."""
    return sum(job.events for job in _jobs(list(_parts(routings)), networks))


def _parts(routings: Sequence[Routing]) -> Iterator[Part]:
    for routing in routings:
        for replay in REPLAYS:
            for counted in COUNTED:
                for slots in SLOTS:
                    if routing.tested.top_k <= slots < routing.tested.n_experts:
                        yield routing, replay, counted, slots


def _policies(part: Part, networks: Path) -> list[tuple[str, str]]:
    """(name in the table, policy)."""
    routing, replay, _, slots = part
    ours = paper_networks.labels(networks, routing, replay, slots)
    return [*((name, name) for name in POLICIES), *ours]


def _jobs(parts: Sequence[Part], networks: Path) -> Iterator[ReplayJob]:
    for part in parts:
        routing, replay, counted, slots = part
        share = slots / routing.tested.n_experts
        for _, policy in _policies(part, networks):
            yield ReplayJob(routing.tested, policy, share, conditions_of(replay, counted), slots)


def _rows(part: Part, outcomes: dict[str, Replay]) -> Iterator[dict[str, Any]]:
    """A row a policy; intervals are bootstrap 95 % over sequences, resampled alike for all."""
    routing, replay, counted, slots = part
    lru = outcomes["lru"]
    sequences = len(lru.per_stream)
    picks = np.random.default_rng(SEED).integers(0, sequences, (_RESAMPLES, sequences))
    for name, outcome in outcomes.items():
        sums = outcome.per_stream[picks].sum(axis=1)
        rates = sums[:, 1] / np.maximum(1, sums[:, 0])
        low, high = np.percentile(rates[sums[:, 0] > 0], [2.5, 97.5])
        yield {
            "trace": routing.name,
            "part": routing.part,
            "replay": replay,
            "counted": counted,
            "slots": slots,
            "experts": routing.tested.n_experts,
            "policy": name,
            "hit_rate": round(outcome.hit_rate, 5),
            "low": round(float(low), 5),
            "high": round(float(high), 5),
            "over_lru": round(outcome.hit_rate / lru.hit_rate - 1, 4),
            "requests": outcome.requests,
            "hits": outcome.hits,
            "sequences": sequences,
        }
