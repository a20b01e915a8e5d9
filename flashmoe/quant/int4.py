"""4 bits a weight: a scale and a zero point for each 32 of a row, by torch's own CPU kernel."""

from __future__ import annotations

import hashlib
from functools import cache

import torch

from flashmoe.errors import FlashMoEError
from flashmoe.quant.base import Parts, Quantiser

GROUP = 32  # weights that share a scale and a zero point
_INNER_K_TILES = 2  # a CPU's kernel requires this argument and ignores it


class Int4(Quantiser):
    """Rounds to 16 steps between the least and the greatest of a group.

    torch packs the steps in an order that depends on the processor's vector width, so a store
    serves one kind of processor; `layout` tells the kinds apart.
    """

    name = "int4"
    device_types = ("cpu",)

    def parts(self, weight: torch.Tensor) -> Parts:
        rows, columns = weight.shape
        if columns % GROUP or rows % 16:
            raise FlashMoEError(
                f"a weight of {rows} x {columns} cannot be packed as int4, which wants rows in "
                f"16s and columns in {GROUP}s: pack it with --quant int8 or none"
            )
        groups = weight.float().reshape(rows, columns // GROUP, GROUP)
        low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
        scales = ((high - low) / 15).clamp_min(1e-8).to(weight.dtype)
        middle = (low + 8 * scales.float()).to(weight.dtype)  # what step 8 stands for
        steps = ((groups - middle.float()) / scales.float()).round() + 8
        packed = _pack(steps.clamp(0, 15).view(rows, columns).int())
        both = torch.cat([scales, middle], 2)  # [rows, groups, 2]
        return {"values": packed, "scales": both.transpose(0, 1).contiguous()}

    def linear(self, x: torch.Tensor, parts: Parts) -> torch.Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(  # type: ignore[no-any-return]
            x.contiguous(), parts["values"], GROUP, parts["scales"]
        )

    def shape(self, parts: dict[str, tuple[int, ...]]) -> tuple[int, int]:
        rows, half = parts["values"]
        return rows, 2 * half

    def layout(self) -> str:
        return _layout()


def _pack(steps: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(steps, _INNER_K_TILES)
    return packed


@cache
def _layout() -> str:
    """A digest of how torch packs a fixed weight on this machine."""
    steps = torch.arange(128 * 128, dtype=torch.int32).view(128, 128)
    packed = _pack((steps * 7 + steps // 128) % 16)
    return hashlib.sha256(packed.numpy().tobytes()).hexdigest()[:16]
