"""Gradients through a layer's experts, whose weights are served again in the backward pass."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from itertools import chain
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from flashmoe.engines.transformers.experts.expert_arithmetic import weighted_output
from flashmoe.engines.transformers.experts.mixture import precision_of
from flashmoe.residency.service import Group


class ServingExperts(Protocol):
    """A layer's experts, whose weights can be served once more after the forward pass."""

    def run(
        self, module: nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden [tokens, width], index and weights [tokens, top_k] -> [tokens, width]."""

    def serve(
        self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> Generator[Group, None, None]:
        """Each expert that `index` names, once, with its parameters."""


def needed(hidden: torch.Tensor, weights: torch.Tensor) -> bool:
    """May a backward pass ask for gradients of these?"""
    return torch.is_grad_enabled() and (hidden.requires_grad or weights.requires_grad)


def run(
    experts: ServingExperts,
    module: nn.Module,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """As `experts.run`, bit for bit; the result has gradients by `hidden` and `weights`."""
    result: torch.Tensor = _Streamed.apply(experts, module, hidden, index, weights)
    return result


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any,
        experts: ServingExperts,
        module: nn.Module,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        context.experts, context.module = experts, module
        context.precision = precision_of(module, hidden, weights)
        device_type = hidden.device.type
        context.autocast = torch.autocast(
            device_type,
            torch.get_autocast_dtype(device_type),
            torch.is_autocast_enabled(device_type),
        )
        context.save_for_backward(hidden, index, weights)
        return experts.run(module, hidden, index, weights)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """gradient [tokens, width] -> those of hidden [tokens, width] and weights [tokens, top_k].

        Slots may hold other experts by now, so each expert is served and computed again.
        """
        hidden, index, weights = context.saved_tensors
        hidden_gradient, weights_gradient = torch.zeros_like(hidden), torch.zeros_like(weights)

        with closing(context.experts.serve(hidden, index, weights)) as groups:
            for expert, parameters in chain.from_iterable(groups):
                token, position = torch.where(index == expert)
                x = hidden[token].detach().requires_grad_()
                share = weights[token, position].detach().requires_grad_()
                with torch.enable_grad(), context.autocast:
                    output = weighted_output(
                        context.module, parameters, x, share[:, None], context.precision
                    )
                # not autograd.grad, because a norm that follows each expert may be trained too
                torch.autograd.backward(output, gradient[token].to(output.dtype))
                hidden_gradient.index_add_(0, token, x.grad.to(hidden_gradient.dtype))
                weights_gradient[token, position] = share.grad
        return None, None, hidden_gradient, None, weights_gradient
