"""nn.Linear whose bfloat16 weight lies as oneDNN multiplies it, where that gives the same bits."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

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

    As soon as anybody wants its parameters, or a gradient through it, it becomes that nn.Linear
    again, for good: same object, same hooks.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super(nn.Linear, self).__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # past nn.Module's own bookkeeping, which would list them as parameters
        frozen = not linear.weight.requires_grad
        self.__dict__.update(_packed=_pack(linear.weight), _bias=linear.bias, _frozen=frozen)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it knows not oneDNN's layout
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]"""
        wants_gradient = torch.is_grad_enabled() and (input.requires_grad or not self._frozen)
        if wants_gradient or input.dtype != torch.bfloat16 or torch.is_autocast_enabled("cpu"):
            return F.linear(input, self.weight, self.bias)
        return _product(input, self.__dict__["_packed"], self.__dict__["_bias"])

    def unpack(self) -> nn.Linear:
        """Become an ordinary nn.Linear. Returns itself."""
        own = self.__dict__
        weight = nn.Parameter(own.pop("_packed").to_dense(), requires_grad=not own.pop("_frozen"))
        own["_parameters"] = {"weight": weight, "bias": own.pop("_bias")}
        self.__class__ = nn.Linear  # type: ignore[assignment]
        return self

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        """[out, in], bfloat16."""
        return self.unpack().weight  # type: ignore[return-value]

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        return self.unpack().bias

    @property
    def _parameters(self) -> dict[str, nn.Parameter | None]:  # type: ignore[override]
        return self.unpack()._parameters

    @_parameters.setter
    def _parameters(self, none: dict[str, nn.Parameter | None]) -> None:
        """nn.Module begins with none."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """Moves and casts, such as `.to(device)`: those that change nothing leave it packed."""
        probe = torch.empty(1, dtype=torch.bfloat16)
        if fn(probe) is probe and not probe.is_shared():
            return self
        return self.unpack()._apply(fn, recurse)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.unpack().__reduce_ex__(protocol)

    def extra_repr(self) -> str:
        has_bias = self._bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={has_bias}"


def pack_all(model: nn.Module) -> None:
    """Pack the linear layers of a filled model, in place, where it pays and changes no bit.

    One after the other, and the heap trimmed after each: the holes that they leave do not hold
    the next one, so that OLMoE's 1.0 GB of dense weights took 1.5.
    """
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    same_bits: dict[tuple[int, int, bool], bool] = {}
    for name, module in list(model.named_modules()):
        # not those that share their weight, such as a head's with the embeddings, who look up rows
        pays = type(module) is nn.Linear and uses[id(module.weight)] == 1 and _pays(module.weight)
        if pays and (packed := _packed(module, same_bits)):
            model.set_submodule(name, packed)
            del module
            _trim_heap()


def _packed(linear: nn.Linear, same_bits: dict[tuple[int, int, bool], bool]) -> PackedLinear | None:
    """Packed, if that gives the same bits, which is tried once for each shape."""
    shape = (linear.out_features, linear.in_features, linear.bias is not None)
    if not same_bits.get(shape, True):
        return None
    try:
        packed = PackedLinear(linear)
        if shape not in same_bits:
            same_bits[shape] = _same_bits(linear, packed)
    except (AttributeError, RuntimeError):  # this torch, or this processor, has no such kernel
        same_bits[shape] = False
    return packed if same_bits[shape] else None


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
