"""Lets an experts module compute with weights that are not in it."""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
from torch import nn

from flashmoe.engines.transformers.model import moe_modules
from flashmoe.engines.transformers.model.streamed_parameter import StreamedParameter
from flashmoe.errors import FlashMoEError


class ExpertsForward(Protocol):
    """What computes in the place of an experts module's own forward."""

    def forward(
        self, module: nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden [tokens, width], index and weights [tokens, top_k] -> [tokens, width]."""


def install(module: nn.Module, experts: ExpertsForward) -> None:
    """From now on `experts` computes what `module` is asked for.

    That raises FlashMoEError where the module's parameters were replaced, adapted or made
    trainable. The configuration is left alone, so that a plain model can be made of it.
    """
    names = tuple(moe_modules.expert_parameters(module))
    module.forward = partial(_forward, module, names, experts)  # type: ignore[method-assign]


def uninstall(module: nn.Module) -> None:
    """From now on `module` raises FlashMoEError: its engine was closed."""
    module.forward = _closed  # type: ignore[method-assign]


# Which experts are read depends on data, so torch.compile cannot trace this.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _forward(
    module: nn.Module,
    names: tuple[str, ...],
    experts: ExpertsForward,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    parameters = [module._parameters.get(name) for name in names]
    if any(type(parameter) is not StreamedParameter for parameter in parameters):
        raise FlashMoEError(
            f"the weights of {type(module).__name__} were replaced or adapted, but FlashMoE "
            "computes with those on the SSD: put adapters (LoRA) on other layers, such as attention"
        )
    if torch.is_grad_enabled() and any(
        parameter.requires_grad for parameter in parameters if parameter is not None
    ):
        raise FlashMoEError(
            "the experts' weights cannot be trained, since they stay on the SSD: leave their "
            "requires_grad False, and train other layers, such as attention, by LoRA"
        )
    return experts.forward(module, hidden_states, top_k_index, top_k_weights)


def _closed(*_: torch.Tensor, **__: torch.Tensor) -> torch.Tensor:
    raise FlashMoEError("this model's FlashMoE engine was closed: load the model again")
