"""How well each policy decides, on held-out routing of the demo model: replayed, exact."""

from __future__ import annotations

import flashmoe
from flashmoe import policies, simulate, trace
from harness.reproduce import demo_expert_bytes

CAPACITY = 0.25
SEQUENCES = (0, 6, 12)


class Quality:
    """Three documents of different kinds, cold, a quarter of the experts resident."""

    params = tuple(policies.available())
    param_names = ("policy",)

    def setup(self, policy: str) -> None:
        self.trace = trace.load(flashmoe.demo_routing_path()).select(SEQUENCES)
        self.outcome = simulate.replay(self.trace, policy, CAPACITY)

    def track_hit_rate(self, policy: str) -> float:
        return self.outcome.hit_rate

    def track_gap_closed(self, policy: str) -> float:
        """Between LRU (0) and Belady (1)."""
        lru, best = (simulate.replay(self.trace, p, CAPACITY).hits for p in ("lru", "belady"))
        return (self.outcome.hits - lru) / (best - lru)

    def track_bytes_per_token(self, policy: str) -> float:
        misses = self.outcome.requests - self.outcome.hits
        return misses * demo_expert_bytes() / len(self.trace.experts)
