"""Gradients through a layer's experts, whose weights are fetched once more on the way back."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from flashmoe.engines.transformers.experts.expert_arithmetic import weighted_output
from flashmoe.engines.transformers.experts.mixture import precision_of
from flashmoe.quant import Parameters


class Experts(Protocol):
    """Who computes a layer's experts, and can bring their weights again."""

    def run(
        self, module: nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor: ...

    def serve(
        self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> Generator[tuple[int, Parameters], None, None]: ...


def needed(hidden: torch.Tensor, weights: torch.Tensor) -> bool:
    """Is anybody going to ask for gradients of these?"""
    return torch.is_grad_enabled() and (hidden.requires_grad or weights.requires_grad)


def run(
    experts: Experts,
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
        experts: Experts,
        module: nn.Module,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        context.experts, context.module, kind = experts, module, hidden.device.type
        context.precision = precision_of(module, hidden, weights)
        context.autocast = torch.autocast(
            kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        )
        context.save_for_backward(hidden, index, weights)
        return experts.run(module, hidden, index, weights)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The weights of slots were overwritten since: each expert is served and computed again."""
        hidden, index, weights = context.saved_tensors
        of_hidden, of_weights = torch.zeros_like(hidden), torch.zeros_like(weights)

        with closing(context.experts.serve(hidden, index, weights)) as arrivals:
            for expert, parameters in arrivals:
                token, position = torch.where(index == expert)
                x = hidden[token].detach().requires_grad_()
                share = weights[token, position].detach().requires_grad_()
                with torch.enable_grad(), context.autocast:
                    output = weighted_output(
                        context.module, parameters, x, share[:, None], context.precision
                    )
                # not autograd.grad: a family's own norm behind each expert may be trained too
                torch.autograd.backward(output, gradient[token].to(output.dtype))
                of_hidden.index_add_(0, token, x.grad.to(of_hidden.dtype))
                of_weights[token, position] = share.grad
        return None, None, of_hidden, None, of_weights
