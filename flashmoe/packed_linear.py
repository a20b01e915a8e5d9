"""nn.Linear whose bfloat16 weight lies as oneDNN multiplies it, where that gives the same bits."""

from __future__ import annotations

from collections import Counter

import torch
import torch.nn.functional as F
from torch import nn

# oneDNN rearranges a plain bf16 weight at each product. Rearranged beforehand it multiplies one
# token 1.4 to 1.5 times as fast from DRAM (14-15 and 20-22 GB/s on two cores of an EPYC), 160
# tokens as fast as before. A weight below this lies in a cache, or is a router's, which some
# families read in place of calling.
PAYS_FROM_BYTES = 1 << 20
_TRIED_ROWS = (1, 2, 3, 8, 17, 40)  # tokens for which both must agree, once for each shape


class PackedLinear(nn.Linear):
    """Computes what the nn.Linear did from which it was made, faster; no gradients.

    Whoever reads its `weight` gets it, and it is an ordinary nn.Linear from then on.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self._packed: torch.Tensor | None = _pack(linear.weight)
        self._plain: nn.Parameter | None = None

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        """[out, in], bfloat16."""
        if self._plain is None:
            assert self._packed is not None
            self._plain = nn.Parameter(self._packed.to_dense())
            self._packed = None
        return self._plain

    @property
    def packed(self) -> bool:
        return self._packed is not None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]"""
        if self._packed is None:
            return F.linear(input, self.weight, self.bias)
        return _product(input, self._packed, self.bias)


def pack(model: nn.Module) -> None:
    """Replace the linear layers of `model` for which it pays and changes no bit.

    Weights are rearranged one after the other, so that the memory of one comes on top.
    """
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    same_bits: dict[tuple[int, int, bool], bool] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear or not _pays(child.weight):
                continue
            if uses[id(child.weight)] > 1:  # with the embeddings, which look up rows of it
                continue
            shape = (child.out_features, child.in_features, child.bias is not None)
            if shape not in same_bits:
                same_bits[shape] = _same_bits(child)
            if same_bits[shape]:
                setattr(parent, name, PackedLinear(child))


def _pays(weight: torch.Tensor) -> bool:
    plain = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    return plain and weight.nbytes >= PAYS_FROM_BYTES


@torch.no_grad()
def _pack(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
    return packed


def _product(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return out


@torch.inference_mode()
def _same_bits(linear: nn.Linear) -> bool:
    """Tried on this machine, for which kernels are used is decided by its processor."""
    generator = torch.Generator().manual_seed(0)
    try:
        packed = _pack(linear.weight)
        for rows in _TRIED_ROWS:
            x = torch.randn(rows, linear.in_features, generator=generator).bfloat16()
            if not torch.equal(linear(x), _product(x, packed, linear.bias)):
                return False
    except (AttributeError, RuntimeError):  # this torch, or this processor, has no such kernel
        return False
    return True
