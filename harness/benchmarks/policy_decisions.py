"""How well each policy decides, on held-out routing of the demo model: replayed, exact."""

from __future__ import annotations

import flashmoe
from flashmoe import policies, trace
from flashmoe.cache import simulate
from harness.tables.hit_rates import demo_expert_bytes

CAPACITY = 0.25
SEQUENCES = (0, 6, 12)

Figures = dict[str, tuple[float, float, float]]  # hit rate, gap closed, bytes a token


class PolicyDecisions:
    """Three documents of different kinds, cold, a quarter of the experts resident."""

    params = tuple(policies.available())
    param_names = ("policy",)
    timeout = 600

    def setup_cache(self) -> Figures:
        """All policies at once: asv starts a process for each figure of each policy."""
        routing = trace.load(flashmoe.demo_routing_path()).select(SEQUENCES)
        replays = {name: simulate.replay(routing, name, CAPACITY) for name in self.params}
        lru, best = replays["lru"].hits, replays["belady"].hits
        bytes_a_miss = demo_expert_bytes() / len(routing.experts)
        return {
            name: (
                outcome.hit_rate,
                (outcome.hits - lru) / (best - lru),
                (outcome.requests - outcome.hits) * bytes_a_miss,
            )
            for name, outcome in replays.items()
        }

    def track_hit_rate(self, figures: Figures, policy: str) -> float:
        return figures[policy][0]

    def track_gap_closed(self, figures: Figures, policy: str) -> float:
        """Between LRU (0) and Belady (1)."""
        return figures[policy][1]

    def track_bytes_per_token(self, figures: Figures, policy: str) -> float:
        return figures[policy][2]
