"""The two kinds of arithmetic, and what the fast one chose for a model."""

from __future__ import annotations

import torch
from torch import nn

from flashmoe.engines.transformers.experts.lone_token import shape_of
from flashmoe.engines.transformers.model import moe_modules, packed_linear
from flashmoe.kernels.choice import Choice, Shape, choice

EXACT, FAST = ARITHMETIC = ("exact", "fast")


def choices(model: nn.Module) -> dict[Shape, Choice]:
    """How weights of each of a bfloat16 model's shapes will be multiplied; measured if need be.

    model: before its weights come, so that there is memory to measure with.
    """
    return {shape: choice(shape) for shape in sorted(_shapes(model))}


def _shapes(model: nn.Module) -> set[Shape]:
    shapes = set()
    for module in model.modules():
        if type(module) is nn.Linear and packed_linear.is_large(module.weight):
            shapes.add(Shape(*module.weight.shape))
    for module in moe_modules.expert_modules(model).values():
        for parameter in moe_modules.expert_parameters(module).values():
            if parameter.dim() == 3 and parameter.dtype == torch.bfloat16:
                shapes.add(shape_of(parameter[0], bool(module.is_transposed)))
    return shapes
