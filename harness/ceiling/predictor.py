"""A large predictor of each expert's next use: attention over all layers' routing so far."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

from flashmoe.policies.parts.features import N_FEATURES
from flashmoe.trace import Trace
from harness.ceiling.moments import N_BUCKETS, Sequence


@dataclass(frozen=True)
class Sizes:
    width: int = 192  # of the attention, whose tokens are those of the model
    layers: int = 3
    heads: int = 6
    rank: int = 48  # of the product of a moment and an expert
    hidden: int = 64  # units for the features of one expert


class Predictor(nn.Module):
    """At each token and layer: the chances of each wait for each expert's next use.

    It sees every earlier token's experts at all layers, those of the present token up to the
    present layer, and what `learned` sees of each expert. Its tables of experts belong to one
    model, so that it knows what that model's experts follow upon.
    """

    mean: torch.Tensor  # of the features, over a sample
    spread: torch.Tensor

    def __init__(self, trace: Trace, sizes: Sizes = Sizes(), dropout: float = 0.15) -> None:
        super().__init__()
        n = trace.n_layers * trace.n_experts
        self.n_experts, self.n_layers = trace.n_experts, trace.n_layers
        self.before = nn.Embedding(n, sizes.width)
        self.present = nn.Embedding(n, sizes.width)
        self.layer = nn.Embedding(trace.n_layers, sizes.width)
        for table in (self.before, self.present, self.layer):
            nn.init.normal_(table.weight, std=0.3)
        self.attention = LlamaModel(
            LlamaConfig(
                vocab_size=1,
                hidden_size=sizes.width,
                intermediate_size=3 * sizes.width,
                num_hidden_layers=sizes.layers,
                num_attention_heads=sizes.heads,
                attention_dropout=dropout,
                use_cache=False,
            )
        )
        self.moment = nn.Sequential(
            nn.LayerNorm(2 * sizes.width),
            nn.Dropout(dropout),
            nn.Linear(2 * sizes.width, 2 * sizes.width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(2 * sizes.width, N_BUCKETS * sizes.rank),
        )
        self.experts = nn.Parameter(torch.randn(trace.n_layers, trace.n_experts, sizes.rank) * 0.05)
        self.usual = nn.Parameter(torch.zeros(trace.n_layers, trace.n_experts, N_BUCKETS))
        self.register_buffer("mean", torch.zeros(N_FEATURES))
        self.register_buffer("spread", torch.ones(N_FEATURES))
        self.features = nn.Sequential(
            nn.Linear(N_FEATURES, sizes.hidden),
            nn.ReLU(),
            nn.Linear(sizes.hidden, sizes.hidden),
            nn.ReLU(),
            nn.Linear(sizes.hidden, N_BUCKETS),
        )

    def forward(self, sequence: Sequence, layers: list[int]) -> list[torch.Tensor]:
        """For each of `layers` the logits [T, E, N_BUCKETS] of the waits after each event."""
        keys = sequence.experts + torch.arange(self.n_layers)[:, None] * self.n_experts
        shares = sequence.shares[..., None]
        tokens = (self.before(keys) * shares).sum((1, 2)) / self.n_layers**0.5
        seen = self.attention(inputs_embeds=tokens[None]).last_hidden_state[0]
        seen = torch.cat([torch.zeros_like(seen[:1]), seen[:-1]])  # all but the present token
        present = (self.present(keys) * shares).sum(2).cumsum(1)  # [T, L, width]
        logits = []
        for layer in layers:
            now = present[:, layer] / (layer + 1) ** 0.5 + self.layer.weight[layer]
            moment = self.moment(torch.cat([seen, now], -1)).view(len(now), N_BUCKETS, -1)
            known = torch.einsum("tbr,er->teb", moment, self.experts[layer]) + self.usual[layer]
            told = (sequence.features(layer) - self.mean) / self.spread
            logits.append(known + self.features(told))
        return logits

    def standardise(self, features: torch.Tensor) -> None:
        """Let the features of `features` [n, N_FEATURES] count alike."""
        self.mean.copy_(features.mean(0))
        self.spread.copy_(features.std(0) + 0.1)
