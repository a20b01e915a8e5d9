"""nn.Linear whose bfloat16 weight lies as oneDNN multiplies it, where that gives the same bits."""

from __future__ import annotations

import ctypes
from collections import Counter
from contextlib import suppress

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


class Packer:
    """Packs linear layers of a model, where it pays and changes no bit, while they are filled.

    One after the other, and the heap trimmed after each: the holes that they leave do not hold
    the next one, so that OLMoE's 1.0 GB of dense weights took 1.5.
    """

    def __init__(self, model: nn.Module) -> None:
        """model: not filled yet, so that tied weights are still seen to be one parameter."""
        self.model = model
        named = list(model.named_parameters(remove_duplicate=False))
        uses = Counter(id(parameter) for _, parameter in named)
        # such as a head's that are the embeddings', who look up rows of it
        self._tied = {name for name, parameter in named if uses[id(parameter)] > 1}
        self._same_bits: dict[tuple[int, int, bool], bool] = {}
        self._usable = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled

    def pack(self, name: str) -> None:
        """Replace the module of that name, if it is a linear layer and all of it is there."""
        linear = self.model.get_submodule(name)
        if not self._usable or type(linear) is not nn.Linear or f"{name}.weight" in self._tied:
            return
        if not _pays(linear.weight) or any(p.is_meta for p in linear.parameters()):
            return
        shape = (linear.out_features, linear.in_features, linear.bias is not None)
        if not self._same_bits.get(shape, True):
            return
        try:
            packed = PackedLinear(linear)
            if shape not in self._same_bits:
                self._same_bits[shape] = _same_bits(linear, packed)
        except (AttributeError, RuntimeError):  # this torch, or this processor, has no such kernel
            self._same_bits[shape] = False
        if self._same_bits[shape]:
            self.model.set_submodule(name, packed)
            del linear
            _trim_heap()


def _pays(weight: torch.Tensor) -> bool:
    large = weight.nbytes >= PAYS_FROM_BYTES
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and large


@torch.no_grad()
def _pack(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
    return packed


def _product(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return out


@torch.inference_mode()
def _same_bits(linear: nn.Linear, packed: PackedLinear) -> bool:
    """Tried on this machine, for which kernels are used is decided by its processor."""
    generator = torch.Generator().manual_seed(0)
    tried = (
        torch.randn(rows, linear.in_features, generator=generator).bfloat16()
        for rows in _TRIED_ROWS
    )
    return all(torch.equal(linear(x), packed(x)) for x in tried)


def _trim_heap() -> None:
    """Return what was freed within the heap to the system, where the C library can (glibc)."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # 0.2 to 1 ms
