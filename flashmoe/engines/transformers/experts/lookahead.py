"""Guesses which experts a layer will choose before its hidden state is known."""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch import nn

from flashmoe.engines.transformers.experts.token_memory import TokenMemory
from flashmoe.engines.transformers.experts.votes import VOTING_TOKENS, in_order
from flashmoe.engines.transformers.model import moe_modules

logger = logging.getLogger(__name__)


class RouterOutput(NamedTuple):
    """What transformers' routers return, in their order."""

    scores: torch.Tensor  # [tokens, experts], logits
    weights: torch.Tensor  # [tokens, top_k], each expert's share in the sum
    experts: torch.Tensor  # [tokens, top_k], integers, the likeliest first


class Lookahead:
    """Asks a layer's own router about the hidden state of the layer below.

    Residual connections change the hidden state little from one layer to the next, so the
    guess is mostly right (docs/speed.md#prefetching-fills-the-drives-idle-time).
    mixtral-offloading, DAOP and Fate guess in the same way.
    routers: by layer; None where a layer has none that can be asked.
    token_memory: of the first MoE layer, which has no layer below it; None: nobody guesses it.
    """

    def __init__(self, model: nn.Module, token_memory: TokenMemory | None = None) -> None:
        self.token_memory = token_memory
        modules = moe_modules.expert_modules(model)
        self.routers = [_router_beside(model, name, module) for name, module in modules.items()]
        self._n_experts = [moe_modules.n_experts(module) for module in modules.values()]

    def route(self, layer: int, hidden: torch.Tensor) -> RouterOutput | None:
        """What the router of `layer` says of hidden [tokens, width], another layer's input.

        None where the layer has no router that can be asked, or does not exist.
        """
        router = self.routers[layer] if layer < len(self.routers) else None
        if router is None:
            return None
        try:
            # `forward`, because a call would run the hooks, which are for the real routing
            output = RouterOutput(*router.forward(hidden))
            if output.experts.is_floating_point() or len(output.experts) != len(hidden):
                raise TypeError("it does not return logits, weights and experts")
        except Exception as error:  # a family's router may take more, or return something else
            logger.debug("no guesses for MoE layer %d: %r", layer, error)
            self.routers[layer] = None
            return None
        return output

    def likely(self, layer: int, hidden: torch.Tensor) -> list[int] | None:
        """The experts that `layer` will probably need, as `votes.in_order`.

        hidden [tokens, width] is the layer below's. None as for `route`.
        """
        output = self.route(layer, hidden[-VOTING_TOKENS:])
        if output is None:
            return None
        return in_order(output.experts.cpu().numpy(), len(hidden), self._n_experts[layer])


def _router_beside(model: nn.Module, name: str, experts: nn.Module) -> nn.Module | None:
    """The sibling of an experts module that scores its experts and chooses among them.

    A plain linear layer is none: it returns scores, and another module chooses.
    """
    count = moe_modules.n_experts(experts)
    for sibling in model.get_submodule(name.rpartition(".")[0]).children():
        weight = getattr(sibling, "weight", None)
        scores = isinstance(weight, nn.Parameter) and weight.dim() == 2 and len(weight) == count
        if scores and not isinstance(sibling, nn.Linear):
            return sibling
    return None
