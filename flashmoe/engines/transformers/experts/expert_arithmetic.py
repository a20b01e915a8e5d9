"""The arithmetic of one expert, by the contract of transformers' `batched_mm` experts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from flashmoe.engines.transformers.experts.precision import Precision
from flashmoe.quant import Parameters, Published, Weight


def weighted_output(
    module: Any, parameters: Parameters, x: torch.Tensor, share: torch.Tensor, precision: Precision
) -> torch.Tensor:
    """What one expert adds to the sum for x [n, width]: [n, width], in the dtype of the sum.

    share: the router's weights for it, [n, 1].
    """
    output = expert_output(module, parameters, x, precision.compute_dtype) * share
    return output.to(precision.sum_dtype)


def expert_output(
    module: Any, parameters: Parameters, x: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """One expert on x [n, width] -> [n, width], before the router's share.

    module: the experts module, which says how. parameters: of that one expert, by name.
    dtype: of the arithmetic, where it is not that of x and the parameters.
    """
    name = "gate_up_proj" if module.has_gate else "up_proj"
    hidden = _linear(module, parameters, name, x, dtype)
    hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
    hidden = _linear(module, parameters, "down_proj", hidden, dtype)
    if module.has_post_expert_norm:
        hidden = module.post_expert_norm(hidden)
    return hidden


def _linear(
    module: Any, parameters: Parameters, name: str, x: torch.Tensor, dtype: torch.dtype | None
) -> torch.Tensor:
    """x [n, in] -> [n, out] by the weight called `name`, and by its bias if it has one."""
    bias: Any = parameters[f"{name}_bias"] if module.has_bias else None
    weight = parameters[name]
    if isinstance(weight, Weight) and isinstance(weight.scheme, Published):
        stored = getattr(module, name).dtype  # of the numbers that it stands for
        weight = weight.scheme.dense(weight.parts, stored, transposed=module.is_transposed)
    if isinstance(weight, Weight):  # quantised: its kernel takes x in one dtype only
        out = weight.linear(x)
        return out if bias is None else out + bias
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
    if module.is_transposed:
        out = x @ weight
        return out if bias is None else out + bias
    return F.linear(x, weight, bias)
