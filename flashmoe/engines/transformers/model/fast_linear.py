"""Linear layers that multiply in the way that is the fastest here."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from flashmoe.engines.transformers.model import packed_linear
from flashmoe.kernels import choice


class FastLinear(nn.Linear):
    """An nn.Linear like any other, but for the last bits of a product that needs no gradient."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input [..., in] -> [..., out]."""
        gradient = torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad)
        if gradient or torch.is_autocast_enabled("cpu") or not choice.takes(input, self.weight):
            return F.linear(input, self.weight, self.bias)
        out = choice.product(input.reshape(-1, self.in_features), self.weight)
        out = out if self.bias is None else out + self.bias
        return out.view(*input.shape[:-1], self.out_features)


def hasten_all(model: nn.Module) -> None:
    """Make the large linear layers of a filled model fast, in place.

    Where oneDNN's own layout is the fastest for one token, they are packed.
    """
    packed_linear.pack_all(
        model, lambda linear: choice.choice(choice.Shape(*linear.weight.shape)).packed
    )
    for module in model.modules():
        if type(module) is nn.Linear and packed_linear.is_large(module.weight):
            module.__class__ = FastLinear
