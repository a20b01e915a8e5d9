"""The arithmetic of one expert, by the contract of transformers' `batched_mm` experts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from flashmoe.engines.transformers.experts.precision import Precision
from flashmoe.kernels import choice
from flashmoe.quant import Parameters, Published, Weight
from flashmoe.quant.by_rows import FEW


def weighted_output(
    module: Any, parameters: Parameters, x: torch.Tensor, share: torch.Tensor, precision: Precision
) -> torch.Tensor:
    """What one expert adds to the sum for x [n, width]: [n, width], in the dtype of the sum.

    share: the router's weights for it, [n, 1].
    """
    output = expert_output(module, parameters, x, precision) * share
    return output.to(precision.sum_dtype)


def expert_output(
    module: Any, parameters: Parameters, x: torch.Tensor, precision: Precision | None = None
) -> torch.Tensor:
    """One expert on x [n, width] -> [n, width], before the router's share.

    module: the experts module, which says how. parameters: of that one expert, by name.
    precision: default, that of x and the parameters.
    """
    precision = precision or Precision(None, x.dtype)
    name = "gate_up_proj" if module.has_gate else "up_proj"
    hidden = _linear(module, parameters, name, x, precision)
    hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
    hidden = _linear(module, parameters, "down_proj", hidden, precision)
    if module.has_post_expert_norm:
        hidden = module.post_expert_norm(hidden)
    return hidden


def _linear(
    module: Any, parameters: Parameters, name: str, x: torch.Tensor, precision: Precision
) -> torch.Tensor:
    """x [n, in] -> [n, out] by the weight called `name`, and by its bias if it has one."""
    bias: Any = parameters[f"{name}_bias"] if module.has_bias else None
    weight, dtype = parameters[name], precision.compute_dtype
    if isinstance(weight, Weight) and isinstance(weight.scheme, Published):
        if precision.fast and len(x) <= FEW and x.device.type == "cpu":
            product = weight.scheme.products(x[None], [weight.parts])
            if product is not None:
                out = product[0].to(dtype or x.dtype)
                return out if bias is None else out + bias.to(out.dtype)
        stored = getattr(module, name).dtype  # of the numbers that it stands for
        weight = weight.scheme.dense(weight.parts, stored, transposed=module.is_transposed)
    if isinstance(weight, Weight):  # quantised: its kernel takes x in one dtype only
        out = weight.linear(x)
        return out if bias is None else out + bias
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
    if precision.fast and choice.takes(x, weight):
        out = choice.product(x, weight.T if module.is_transposed else weight)
        return out if bias is None else out + bias
    if module.is_transposed:
        out = x @ weight
        return out if bias is None else out + bias
    return F.linear(x, weight, bias)
