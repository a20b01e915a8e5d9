"""What a model takes, as the heads of its files say it, whichever engine runs it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelFacts:
    """A model's sizes. Layers are those that have experts."""

    engine: str  # the name of its package
    architecture: str
    weights: str  # the format of most of the experts' bytes, in lower case
    layers: int
    n_experts: int  # of each layer
    top_k: int
    experts_bytes: int  # of all layers
    dense_bytes: int  # all else, which stays in memory
    dense_token_bytes: int  # what a token reads of that: of an embedding table one row
    beside_bytes: int  # what a prompt takes besides
    parameters: int  # weights in all
    expert_parameters: int  # of all layers' experts
    kv_bytes: int  # of the KV cache, a token in the context
    window_kv_bytes: int  # the same, of layers that look back no further than `window_tokens`
    window_tokens: int
    least_bytes: int  # the smallest budget for experts
    reserve_bytes: int  # what memory="auto" leaves free at least

    @property
    def expert_bytes(self) -> float:
        """Of one expert, the mean."""
        return self.experts_bytes / (self.layers * self.n_experts)

    @property
    def touched_bytes(self) -> float:
        """Of experts that one token multiplies by."""
        return self.layers * self.top_k * self.expert_bytes

    @property
    def touched_parameters(self) -> float:
        """Weights of experts that one token multiplies by."""
        return self.expert_parameters * self.top_k / self.n_experts

    @property
    def dense_bytes_per_weight(self) -> float:
        """Of all but experts."""
        return self.dense_bytes / max(self.parameters - self.expert_parameters, 1)

    @property
    def total_bytes(self) -> int:
        return self.experts_bytes + self.dense_bytes

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.total_bytes / self.parameters

    def cache_bytes(self, tokens: int) -> int:
        """Of the KV cache, with so many tokens in the context."""
        return tokens * self.kv_bytes + min(tokens, self.window_tokens) * self.window_kv_bytes
