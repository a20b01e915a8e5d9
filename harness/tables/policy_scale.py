"""What a decision costs where a model has many experts: made-up routing, measured time."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from flashmoe.cache import simulate
from flashmoe.trace import Trace

POLICIES = ("lru", "lfu-decay", "learned")
CAPACITY = 0.25
TOKENS, LAYERS, ROUNDS = 600, 2, 3  # a layer costs the same wherever it lies
SKEW, STAYS = 0.7, 0.35  # of experts' popularity; how many of a token's experts the last one had
# How fast a desktop's memory can be read (two channels of DDR5-6400), and an expert's bits: what
# a token takes at the very least, where every expert is in memory.
MEMORY_BYTES_PER_SECOND, BITS = 100e9, 4


class Geometry(NamedTuple):
    name: str
    layers: int
    experts: int
    top_k: int
    expert_weights: int  # numbers of one expert


GEOMETRIES = (
    Geometry("16 x 64, top 8 (OLMoE-1B-7B)", 16, 64, 8, 3 * 2048 * 1024),
    Geometry("58 x 256, top 8 (DeepSeek-V3)", 58, 256, 8, 3 * 7168 * 2048),
    Geometry("61 x 384, top 8 (Kimi-K2)", 61, 384, 8, 3 * 7168 * 2048),
    Geometry("90 x 896, top 16 (made up, of small experts)", 90, 896, 16, 3 * 4096 * 1024),
)


def routing(geometry: Geometry, seed: int = 0) -> Trace:
    """Made-up routing: some experts are popular, and some stay from one token to the next."""
    rng = np.random.default_rng(seed)
    experts = np.empty((TOKENS, LAYERS, geometry.top_k), np.uint16)
    for layer in range(LAYERS):
        popularity = rng.permutation(np.arange(1, geometry.experts + 1) ** -SKEW)
        last = np.empty(0, np.int64)
        for token in range(TOKENS):
            stay = last[rng.random(len(last)) < STAYS]
            chances = popularity.copy()
            chances[stay] = 0
            new = rng.choice(
                geometry.experts, geometry.top_k - len(stay), False, chances / chances.sum()
            )
            last = np.concatenate([stay, new])
            experts[token, layer] = last
    return Trace(experts, np.zeros(TOKENS, np.int32), geometry.experts)


def table() -> list[dict[str, Any]]:
    """A row for each geometry and policy: the fastest of some rounds, since noise only adds."""
    rows = []
    for geometry in GEOMETRIES:
        made = routing(geometry)
        for policy in POLICIES:
            replays = [simulate.replay(made, policy, CAPACITY) for _ in range(ROUNDS)]
            seconds = min(replay.policy_seconds for replay in replays) / (TOKENS * LAYERS)
            active_bytes = geometry.layers * geometry.top_k * geometry.expert_weights * BITS / 8
            token_seconds = active_bytes / MEMORY_BYTES_PER_SECOND
            rows.append(
                {
                    "geometry": geometry.name,
                    "policy": policy,
                    "slots": replays[0].slots,
                    "hit_rate": round(replays[0].hit_rate, 4),
                    "microseconds_per_event": 1e6 * seconds,
                    "milliseconds_per_token": 1e3 * seconds * geometry.layers,
                    "share_of_token": seconds * geometry.layers / token_seconds,
                }
            )
    return rows
