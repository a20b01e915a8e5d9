"""Linear layers whose bf16 weight lies as oneDNN multiplies it, where the bits stay the same."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from flashmoe.kernels import packed

# Smaller weights stay in the processor's cache, or are a router's, which some families read
# instead of calling it (docs/speed.md#packed-weights).
PACK_FROM_BYTES = 1 << 20
_TRIAL_ROWS = (1, 2, 3, 8, 17, 40)  # numbers of tokens for which plain and packed must agree


class PackedLinear(nn.Linear):
    """Computes the same bits as the nn.Linear that it was made of, faster; no gradients.

    READING `weight`, `bias` OR THE PARAMETERS CHANGES THE LAYER: this object becomes a plain
    nn.Linear again, for good, with its hooks. So do a gradient, autocast or another dtype, a move
    or cast, a copy and pickling. Libraries may therefore use it as any linear layer. Whoever wants
    it to stay packed asks only for `in_features`, `out_features` and the product.
    """

    def __init__(self, linear: nn.Linear) -> None:
        """linear: bfloat16, on the CPU; it stays as it is.

        Raises AttributeError or RuntimeError where this torch, or this processor, cannot pack.
        """
        super(nn.Linear, self).__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # past nn.Module's own bookkeeping, which would list them as parameters
        frozen = not linear.weight.requires_grad
        self.__dict__.update(
            _packed=packed.rearranged(linear.weight), _bias=linear.bias, _frozen=frozen
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it cannot trace oneDNN's layout
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input [..., in] -> [..., out]."""
        wants_gradient = torch.is_grad_enabled() and (input.requires_grad or not self._frozen)
        if wants_gradient or input.dtype != torch.bfloat16 or torch.is_autocast_enabled("cpu"):
            plain = self.unpack()
            return F.linear(input, plain.weight, plain.bias)
        return packed.product(input, self.__dict__["_packed"], self.__dict__["_bias"])

    def unpack(self) -> nn.Linear:
        """Become a plain nn.Linear, for good; the result is this object."""
        state = self.__dict__
        dense = state.pop("_packed").to_dense()
        weight = nn.Parameter(dense, requires_grad=not state.pop("_frozen"))
        state["_parameters"] = {"weight": weight, "bias": state.pop("_bias")}
        self.__class__ = nn.Linear  # type: ignore[assignment]
        return self

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        """[out, in], bfloat16. Reading it unpacks this layer for good: see the class."""
        return self.unpack().weight  # type: ignore[return-value]

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        """[out], bfloat16, if any. Reading it unpacks this layer for good: see the class."""
        return self.unpack().bias

    @property
    def _parameters(self) -> dict[str, nn.Parameter | None]:  # type: ignore[override]
        """nn.Module's own, by which it lists and copies. Reading them unpacks this layer."""
        return self.unpack()._parameters

    @_parameters.setter
    def _parameters(self, parameters: dict[str, nn.Parameter | None]) -> None:
        """Ignored: nn.Module's constructor sets an empty dict."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """Moves and casts, such as `.to(device)`; those that change nothing leave it packed."""
        probe = torch.empty(1, dtype=torch.bfloat16)
        if fn(probe) is probe and not probe.is_shared():
            return self
        return self.unpack()._apply(fn, recurse)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.unpack().__reduce_ex__(protocol)

    def extra_repr(self) -> str:
        has_bias = self._bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={has_bias}"


def pack_all(model: nn.Module, wanted: Callable[[nn.Linear], bool] = lambda linear: True) -> None:
    """Pack the linear layers of a filled model, in place, where it is faster and changes no bit.

    wanted: which of them at most.

    The heap is trimmed after each, because the holes that plain weights leave hold no packed one.
    """
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return
    n_users = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    same_bits: dict[tuple[int, int, bool], bool] = {}
    # names, because a list of the modules would keep every plain weight alive until the end
    for name in [name for name, _ in model.named_modules()]:
        module = model.get_submodule(name)
        if type(module) is not nn.Linear or not is_large(module.weight) or not wanted(module):
            continue
        if n_users[id(module.weight)] > 1:  # such as a head's, whose rows the embeddings look up
            continue
        if layer := _packed_if_same_bits(module, same_bits):
            model.set_submodule(name, layer)
            del module  # its weight is to be gone before the heap is trimmed
            _trim_heap()


def _packed_if_same_bits(
    linear: nn.Linear, same_bits: dict[tuple[int, int, bool], bool]
) -> PackedLinear | None:
    """None where packing would change a bit, or cannot be done here.

    same_bits: what was tried so far, by (out, in, has a bias); each shape is tried once.
    """
    shape = (linear.out_features, linear.in_features, linear.bias is not None)
    if not same_bits.get(shape, True):
        return None
    try:
        layer = PackedLinear(linear)
        if shape not in same_bits:
            same_bits[shape] = _same_bits(linear, layer)
    except (AttributeError, RuntimeError):  # of PackedLinear: there is no such kernel here
        same_bits[shape] = False
    return layer if same_bits[shape] else None


def is_large(weight: torch.Tensor) -> bool:
    """In bfloat16 for the CPU, and of `PACK_FROM_BYTES` or more."""
    large = weight.nbytes >= PACK_FROM_BYTES
    return weight.device.type in ("cpu", "meta") and weight.dtype == torch.bfloat16 and large


@torch.inference_mode()
def _same_bits(linear: nn.Linear, layer: PackedLinear) -> bool:
    """Tried on this machine, because the processor decides which kernels multiply."""
    generator = torch.Generator().manual_seed(0)
    trials = (
        torch.randn(rows, linear.in_features, generator=generator).bfloat16()
        for rows in _TRIAL_ROWS
    )
    return all(torch.equal(linear(x), layer(x)) for x in trials)


def _trim_heap() -> None:
    """Return the heap's free memory to the system, where the C library (glibc) can."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
