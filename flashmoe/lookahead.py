"""Guesses which experts a layer will choose before its hidden state is known."""

from __future__ import annotations

import logging

import torch
from torch import nn

from flashmoe import skeleton

logger = logging.getLogger(__name__)


class Lookahead:
    """A layer's own router on the layer below's hidden state (mixtral-offloading, DAOP, Fate).

    Residual connections change the hidden state little from one layer to the next, so the
    guess is mostly right: docs/speed.md has the shares by model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.routers = [
            _router_beside(model, name, module)
            for name, module in skeleton.expert_modules(model).items()
        ]

    def route(
        self, layer: int, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """What `layer` would choose for hidden [tokens, width], another layer's input.

        Returns index and weights [tokens, top_k]; weights None where the family's router does not
        tell them, and None altogether where the layer has no router to ask or does not exist.
        """
        router = self.routers[layer] if layer < len(self.routers) else None
        if router is None:
            return None
        try:
            parts = router.forward(hidden)  # not called: hooks are for the model's own routing
        except Exception as error:  # a family's router may want more than the hidden state
            logger.debug("no guesses for MoE layer %d: %r", layer, error)
            self.routers[layer] = None
            return None
        index = next(part for part in parts if not part.is_floating_point())
        same = [p for p in parts if p.is_floating_point() and p.shape == index.shape]
        return index, same[-1] if same else None


def _router_beside(model: nn.Module, name: str, experts: nn.Module) -> nn.Module | None:
    """The sibling of an experts module that scores its experts, if it also picks them."""
    count = skeleton.n_experts(experts)
    for sibling in model.get_submodule(name.rpartition(".")[0]).children():
        weight = getattr(sibling, "weight", None)
        scores = isinstance(weight, nn.Parameter) and weight.dim() == 2 and len(weight) == count
        if scores and not isinstance(sibling, nn.Linear):
            return sibling
    return None
