"""What a policy's decisions cost, in the cache code that simulator and engine share."""

from __future__ import annotations

import flashmoe
from flashmoe import policies, trace
from flashmoe.cache import simulate
from flashmoe.trace import Trace

TOKENS = 256


class Replay:
    """256 tokens x 16 layers x top-8 of the demo's routing, a quarter of the experts resident."""

    params = tuple(policies.available())
    param_names = ("policy",)

    def setup(self, policy: str) -> None:
        whole = trace.load(flashmoe.demo_routing_path())
        self.trace = Trace(whole.experts[:TOKENS], whole.sequence[:TOKENS], whole.n_experts)

    def time_replay(self, policy: str) -> None:
        simulate.replay(self.trace, policy, 0.25)

    def track_microseconds_a_layer(self, policy: str) -> float:
        """Per token and layer; an expert of OLMoE-1B-7B takes some 5,000 to read."""
        outcome = simulate.replay(self.trace, policy, 0.25)
        return 1e6 * outcome.policy_seconds / (TOKENS * self.trace.n_layers)
