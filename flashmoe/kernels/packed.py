"""Multiplies by a bfloat16 weight in oneDNN's own layout."""

from __future__ import annotations

import torch


@torch.no_grad()
def rearranged(weight: torch.Tensor) -> torch.Tensor:
    """A weight [out, in] in that layout.

    Raises AttributeError or RuntimeError where this torch, or this processor, has none.
    """
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
    return packed


def product(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x [..., in] bfloat16 -> [..., out]."""
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return out
