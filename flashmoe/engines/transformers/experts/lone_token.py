"""The weighted sum of one token's experts in fast arithmetic, which computes several at once.

A token's work is small, so what surrounds the products counts: Python and torch are asked once for
all experts that are there. Nothing but an expert and the token decides what the expert adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from flashmoe.engines.transformers.experts.expert_arithmetic import expert_output
from flashmoe.engines.transformers.experts.precision import Precision
from flashmoe.kernels import choice
from flashmoe.kernels.choice import Shape
from flashmoe.quant import Parameters, Published, Weight
from flashmoe.residency.service import Group

# torch computes so many elements in one thread, and whole vectors of a row alike wherever it lies.
_MOST_ELEMENTS, _VECTOR = 1 << 15, 64


class LoneToken:
    """As `Mixture`, of hidden [1, width]; it adds in float32, in ascending order of expert."""

    def __init__(
        self,
        module: Any,
        hidden: torch.Tensor,
        weights: torch.Tensor,
        experts: Sequence[int],
        precision: Precision,
    ) -> None:
        """module: the experts module. experts: different ones; weights [1, top_k] are theirs."""
        self.module, self.hidden, self.precision = module, hidden, precision
        order = sorted(range(len(experts)), key=experts.__getitem__)
        self._rank = {experts[position]: rank for rank, position in enumerate(order)}
        self._shares = weights[0, order, None].to(torch.float32)  # [top_k, 1]
        self._outputs = torch.empty(len(experts), hidden.shape[1])
        self._wide = hidden.to(torch.float32)

    def add_all(self, group: Group) -> None:
        """Compute experts; their parameters are needed until this returns."""
        most = self._most_at_once(group[0][1])
        for start in range(0, len(group), most):
            some = group[start : start + most]
            ranks = [self._rank[expert] for expert, _ in some]
            outputs = self._output([parameters for _, parameters in some])
            if outputs is None:
                outputs = torch.cat([
                    expert_output(self.module, parameters, self.hidden, self.precision)
                    for _, parameters in some
                ])  # fmt: skip
            self._outputs[ranks] = outputs.to(torch.float32)

    def total(self) -> torch.Tensor:
        """[1, width] in the dtype of `hidden`, once every expert was added."""
        return (self._outputs * self._shares).sum(0, keepdim=True).to(self.hidden.dtype)

    def _most_at_once(self, parameters: Parameters) -> int:
        """So many experts' hidden states get the same bits at once as one by one."""
        width = shape_of(parameters["down_proj"], self.module.is_transposed).columns
        if self.module.has_post_expert_norm or width % _VECTOR:
            return 1
        return max(1, _MOST_ELEMENTS // (2 * width))

    def _output(self, many: list[Parameters]) -> torch.Tensor | None:
        """Of each expert, before its share: float32 [many, width]; None without a kernel for it."""
        if self.precision.compute_dtype is not None or self.module.has_post_expert_norm:
            return None
        module = self.module
        name = "gate_up_proj" if module.has_gate else "up_proj"
        hidden = self._products(name, many, self._wide.expand(len(many), 1, -1))
        if hidden is None:
            return None
        hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
        return self._products("down_proj", many, hidden[:, None])

    def _products(self, name: str, many: list[Parameters], x: torch.Tensor) -> torch.Tensor | None:
        """x [many, 1, in] -> [many, out] by the weights called `name`, and their biases."""
        weights: list[Any] = [parameters[name] for parameters in many]
        out = self._weight_products(weights, x)
        if out is not None and self.module.has_bias:
            biases: list[Any] = [parameters[f"{name}_bias"] for parameters in many]
            return out[:, 0] + torch.stack(biases)
        return None if out is None else out[:, 0]

    def _weight_products(self, weights: list[Any], x: torch.Tensor) -> torch.Tensor | None:
        first = weights[0]
        if isinstance(first, Weight):
            if not isinstance(first.scheme, Published):
                return None
            return first.scheme.products(x, [weight.parts for weight in weights])
        if not choice.takes(self.hidden, first):
            return None
        if self.module.is_transposed:
            weights = [weight.T for weight in weights]
        return choice.products(x, weights)


def shape_of(weight: torch.Tensor | Weight, transposed: bool) -> Shape:
    """Of a weight among an expert's parameters."""
    if isinstance(weight, Weight):
        shapes = {part: tuple(tensor.shape) for part, tensor in weight.parts.items()}
        return Shape(*weight.scheme.shape(shapes))
    rows, columns = weight.shape
    return Shape(columns, rows, True) if transposed else Shape(rows, columns)
