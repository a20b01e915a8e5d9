"""Computes one layer's experts module from weights that come from the slots or the drive."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import closing
from functools import partial

import torch
from torch import nn

from flashmoe.engines.transformers.experts import gradients
from flashmoe.engines.transformers.experts.lone_token import LoneToken
from flashmoe.engines.transformers.experts.lookahead import Lookahead
from flashmoe.engines.transformers.experts.mixture import Mixture, precision_of
from flashmoe.residency.residency import Residency
from flashmoe.residency.service import Group


class StreamedExperts:
    """One layer's experts: `forward` stands in for the module's own.

    number: of the layer, counted among the MoE layers from 0. fast: as `loading.load`'s
    arithmetic; where gradients are asked for, it is exact all the same.
    """

    def __init__(
        self,
        number: int,
        residency: Residency,
        lookahead: Lookahead,
        *,
        fast: bool = False,
    ) -> None:
        self.number = number
        self.fast = fast
        self.residency = residency
        self.lookahead = lookahead

    def forward(
        self, module: nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden [tokens, width], index and weights [tokens, top_k] -> [tokens, width]."""
        if gradients.needed(hidden, weights):
            return gradients.run(self, module, hidden, index, weights)
        return self.run(module, hidden, index, weights, fast=self.fast)

    def run(
        self,
        module: nn.Module,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        *,
        fast: bool = False,
    ) -> torch.Tensor:
        """As `forward`, without gradients."""
        with self.residency.lock:
            started = time.perf_counter()
            mixture = mixture_of(module, hidden, index, weights, fast=fast)
            with closing(self.serve(hidden, index, weights)) as groups:
                for group in groups:
                    mixture.add_all(group)
            total = mixture.total()
            timings = self.residency.timings
            timings.total_seconds += timings.since(started, "layer")
            return total

    def serve(
        self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> Generator[Group, None, None]:
        """Each expert that `index` names, once, with its parameters when they are in a slot."""
        with self.residency.lock:
            # On an accelerator this waits for all earlier arithmetic, so that no slot is
            # overwritten while a kernel still reads it.
            rows = index.cpu().numpy()
            if self.number == 0 and self.lookahead.token_memory:
                self.lookahead.token_memory.note(rows)
            shares = weights.detach().float().cpu().numpy()
            likely = partial(self.lookahead.likely, self.number + 1, hidden)
            yield from self.residency.serve(self.number, rows, shares, likely)


def mixture_of(
    module: nn.Module,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    *,
    fast: bool,
) -> Mixture | LoneToken:
    """What computes these tokens. Raises FlashMoEError as `Mixture` does."""
    precision = precision_of(module, hidden, weights)
    if fast and len(index) == 1 and hidden.device.type == "cpu":
        experts = index[0].tolist()
        if len(set(experts)) == len(experts):
            return LoneToken(module, hidden, weights, experts, precision._replace(fast=True))
    return Mixture(module, hidden, index, weights, precision._replace(fast=fast))
