"""The arithmetic of a layer's experts: one expert at a time, in whatever order they come.

Each expert's output is computed on its own and the outputs are added in ascending order of
expert, as transformers' `eager` does: results do not depend on which experts were resident, or
in which order the others arrived.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from flashmoe.quant import Weight

Parameters = dict[str, torch.Tensor | Weight]  # of an expert, by the module's parameter names
Compute = Callable[[int, Parameters], None]


def run(
    module: nn.Module,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    serve: Callable[[Compute], None],
) -> torch.Tensor:
    """hidden [tokens, width], index and weights [tokens, top_k] -> [tokens, width].

    `serve(compute)` calls compute(expert, parameters) once for each expert that `index` names,
    in any order; the parameters need be there during the call only.
    """
    if len(hidden) == 1:
        return _one_token(module, hidden, index[0].tolist(), weights, serve)
    return _many_tokens(module, hidden, index, weights, serve)


def _one_token(
    module: nn.Module,
    hidden: torch.Tensor,
    row: list[int],
    weights: torch.Tensor,
    serve: Callable[[Compute], None],
) -> torch.Tensor:
    outputs: dict[int, torch.Tensor] = {}

    def compute(expert: int, parameters: Parameters) -> None:
        output = expert_output(module, parameters, hidden)
        outputs[expert] = (output * weights[:, row.index(expert), None]).to(hidden.dtype)

    serve(compute)
    total = torch.zeros_like(hidden)
    for expert in sorted(outputs):
        total += outputs[expert]
    return total


def _many_tokens(
    module: nn.Module,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    serve: Callable[[Compute], None],
) -> torch.Tensor:
    tokens, top_k = index.shape
    outputs = hidden.new_empty(tokens, top_k, hidden.shape[-1])
    # eager gathers an expert's tokens by position in top_k, then by token: so do we, since
    # the order of rows may decide the last bit of a matrix product
    by_position = index.T.reshape(-1)
    order = torch.argsort(by_position, stable=True)
    ends = torch.bincount(by_position).cumsum(0).tolist()

    def compute(expert: int, parameters: Parameters) -> None:
        mine = order[ends[expert - 1] if expert else 0 : ends[expert]]
        token, position = mine % tokens, mine // tokens
        output = expert_output(module, parameters, hidden[token])
        output = output * weights[token, position, None]
        outputs[token, position] = output.to(hidden.dtype)

    serve(compute)
    ascending = index.argsort(dim=1)
    outputs = outputs.gather(1, ascending[..., None].expand_as(outputs))
    total = torch.zeros_like(hidden)
    for position in range(top_k):
        total += outputs[:, position]
    return total


def expert_output(module: nn.Module, parameters: Parameters, x: torch.Tensor) -> torch.Tensor:
    """One expert on x [n, width], by the contract of transformers' `batched_mm` experts."""
    gated, name = module.has_gate, "gate_up_proj" if module.has_gate else "up_proj"
    hidden = _linear(module, parameters, name, x)
    hidden = module._apply_gate(hidden) if gated else module.act_fn(hidden)  # type: ignore[operator]
    hidden = _linear(module, parameters, "down_proj", hidden)
    if module.has_post_expert_norm:
        hidden = module.post_expert_norm(hidden)  # type: ignore[operator]
    return hidden


def _linear(module: nn.Module, parameters: Parameters, name: str, x: torch.Tensor) -> torch.Tensor:
    bias, weight = parameters[f"{name}_bias"] if module.has_bias else None, parameters[name]
    if isinstance(weight, Weight):
        out = weight.linear(x)
    elif module.is_transposed:
        out = x @ weight
    else:
        return F.linear(x, weight, bias)  # type: ignore[arg-type]
    return out if bias is None else out + bias  # type: ignore[operator]
