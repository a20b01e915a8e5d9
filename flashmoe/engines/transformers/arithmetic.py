"""The arithmetic of a layer's experts: one expert at a time, in whatever order they come.

Each expert's output is computed on its own and the outputs are added in ascending order of
expert, as transformers' `eager` does: results do not depend on which experts were resident, or
in which order the others arrived.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from flashmoe.engines.transformers import eager
from flashmoe.engines.transformers.eager import Precision
from flashmoe.quant import Weight

Parameters = dict[str, torch.Tensor | Weight]  # of an expert, by the module's parameter names
Compute = Callable[[int, Parameters], None]
# The tokens that chose an expert [n], and for each its position in top_k [n]. Of one token that
# decodes: None, and a number; indexing would take as long as the arithmetic of a small expert.
Choices = tuple[torch.Tensor, torch.Tensor] | tuple[None, int]


def run(
    module: nn.Module,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    serve: Callable[[Compute], None],
) -> torch.Tensor:
    """hidden [tokens, width], index and weights [tokens, top_k] -> [tokens, width].

    `serve(compute)` calls compute(expert, parameters) once for each expert that `index` names,
    in any order; the parameters need be there during the call only. Beside the result it takes
    memory for one expert's arithmetic, and for each output that comes before its turn.
    Raises FlashMoEError when the module's own arithmetic is none that is known here.
    """
    return _run(module, hidden, index, weights, serve, precision(module, hidden, weights))


def precision(module: nn.Module, hidden: torch.Tensor, weights: torch.Tensor) -> Precision:
    """See `eager.precision`, which raises what `run` raises."""
    return eager.precision(module, hidden, weights, _of_example)


def _run(
    module: nn.Module | eager.Example,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    serve: Callable[[Compute], None],
    precision: Precision,
) -> torch.Tensor:
    choices = _by_expert(index)
    total = OrderedSum(torch.zeros_like(hidden, dtype=precision.adds), sorted(choices))

    def compute(expert: int, parameters: Parameters) -> None:
        tokens, positions = choices[expert]
        if tokens is None:
            x, share = hidden, weights[:, positions, None]
        else:
            x, share = hidden[tokens], weights[tokens, positions, None]
        total.add(expert, tokens, weighted_output(module, parameters, x, share, precision))

    serve(compute)
    return total.value.to(hidden.dtype)


def _of_example(
    example: eager.Example,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    precision: Precision,
) -> torch.Tensor:
    def serve(compute: Compute) -> None:
        for expert in range(eager.EXPERTS):
            compute(expert, dict(example.expert(expert)))

    return _run(example, hidden, index, weights, serve, precision)


def _by_expert(index: torch.Tensor) -> dict[int, Choices]:
    """Who chose each expert, of index [tokens, top_k], in the order in which eager takes them.

    That is by position in top_k, then by token: the order of rows may decide the last bit of a
    matrix product.
    """
    tokens, top_k = index.shape
    if tokens == 1:
        row = {expert: position for position, expert in enumerate(index[0].tolist())}
        if len(row) == top_k:  # a token may choose an expert twice: deepseek_v4's hash routing
            return {expert: (None, position) for expert, position in row.items()}
    by_position = index.T.reshape(-1)  # [top_k * tokens]
    chosen = torch.argsort(by_position, stable=True).split(torch.bincount(by_position).tolist())
    return {
        expert: (mine % tokens, mine // tokens) for expert, mine in enumerate(chosen) if len(mine)
    }


class OrderedSum:
    """Adds experts' outputs in ascending order of expert; one that comes early waits its turn.

    value [tokens, width] is the sum once all of `experts` (ascending) were added; early holds
    what waits. Several threads may add.
    """

    def __init__(self, value: torch.Tensor, experts: list[int]) -> None:
        self.value = value
        self._turns = experts[::-1]
        self.early: dict[int, tuple[torch.Tensor | None, torch.Tensor]] = {}
        self._lock = threading.Lock()

    def add(self, expert: int, tokens: torch.Tensor | None, output: torch.Tensor) -> None:
        """Add output [n, width] to the sums of these tokens (None: of all), or when it is due."""
        with self._lock:
            self.early[expert] = tokens, output
            while self._turns and self._turns[-1] in self.early:
                tokens, output = self.early.pop(self._turns.pop())
                if tokens is None:
                    self.value.add_(output)
                else:
                    self.value.index_add_(0, tokens, output)


def weighted_output(
    module: Any, parameters: Parameters, x: torch.Tensor, share: torch.Tensor, precision: Precision
) -> torch.Tensor:
    """What one expert adds for x [n, width], with the router's share [n, 1], as it is added."""
    output = expert_output(module, parameters, x, precision.computes) * share
    return output.to(precision.adds)


def expert_output(
    module: Any, parameters: Parameters, x: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """One expert on x [n, width], by the contract of transformers' `batched_mm` experts.

    dtype: of the arithmetic, where it is not that of x and the parameters.
    """
    gated, name = module.has_gate, "gate_up_proj" if module.has_gate else "up_proj"
    hidden = _linear(module, parameters, name, x, dtype)
    hidden = module._apply_gate(hidden) if gated else module.act_fn(hidden)
    hidden = _linear(module, parameters, "down_proj", hidden, dtype)
    if module.has_post_expert_norm:
        hidden = module.post_expert_norm(hidden)
    return hidden


def _linear(
    module: Any, parameters: Parameters, name: str, x: torch.Tensor, dtype: torch.dtype | None
) -> torch.Tensor:
    bias: Any = parameters[f"{name}_bias"] if module.has_bias else None  # a tensor, if any
    weight = parameters[name]
    if isinstance(weight, Weight):  # which has a kernel for its own dtype only
        out = weight.linear(x)
        return out if bias is None else out + bias
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
    if module.is_transposed:
        out = x @ weight
        return out if bias is None else out + bias
    return F.linear(x, weight, bias)
