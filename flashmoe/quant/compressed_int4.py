"""int4 as compressed-tensors packs it: two weights a byte along a row, a factor for each group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from flashmoe.quant import by_rows, nibbles, plain
from flashmoe.quant.base import Parts
from flashmoe.quant.nibbles import FLOATS
from flashmoe.quant.published import Kinds, Published
from flashmoe.quant.small_floats import INTEGER_UNIT, high_integer, low_integer

_NUMBERS = tuple(float(bits - 8) for bits in range(16))


class CompressedInt4(Published):
    """Symmetric, as Kimi K2 and most others are; a group is part of a row, or all of it."""

    name = "compressed-int4"
    method = "compressed-tensors"
    endings: ClassVar = {"values": ".weight_packed", "scales": ".weight_scale"}
    unused = (".weight_shape",)

    @classmethod
    def reads(cls, settings: Mapping[str, Any]) -> bool:
        groups = settings.get("config_groups")
        weights = [
            group.get("weights") or {}
            for group in (groups.values() if isinstance(groups, dict) else ())
        ]
        return super().reads(settings) and any(
            (kind.get("num_bits"), kind.get("type"), kind.get("symmetric")) == (4, "int", True)
            for kind in weights
        )

    def accepts(self, kinds: Kinds, settings: Mapping[str, Any]) -> bool:
        (dtype, values), (scale_dtype, scales) = kinds["values"], kinds["scales"]
        flat = len(values) == len(scales) == 2 and values[0] == scales[0] and all(scales)
        known = dtype == torch.int32 and scale_dtype in FLOATS
        return known and flat and 8 * values[1] % scales[1] == 0

    def weight(self, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        scales = parts["scales"]
        on_cpu, groups = scales.device.type == "cpu", _by_group(parts)
        if on_cpu and groups and dtype == scales.dtype == torch.bfloat16:
            return plain.of_halves(_HALVES, by_rows.factor_of(scales), *groups)
        values = parts["values"].view(torch.uint8)  # [out, in / 2]
        numbers = torch.stack(list(nibbles.look_up(values, _NUMBERS, scales.dtype)), 2)
        whole = numbers.view(len(scales), scales.shape[1], -1)
        return whole.mul_(scales[:, :, None]).view(len(scales), -1).to(dtype)

    def weight_products(self, x: torch.Tensor, many: Sequence[Parts]) -> torch.Tensor | None:
        weights = [groups for parts in many if (groups := _by_group(parts))]
        if len(weights) < len(many):
            return None
        return by_rows.times_halves(_HALVES, by_rows.factor_of(weights[0].scales), weights, x)

    def weight_shape(self, parts: dict[str, tuple[int, ...]]) -> tuple[int, int]:
        rows, words = parts["values"]
        return rows, 8 * words


_HALVES = by_rows.Halves(low_integer, high_integer, INTEGER_UNIT, offset=16 + 8)


def _by_group(parts: Parts) -> by_rows.Quantised | None:
    """Values and scales of each row's groups; None where a byte belongs to two."""
    scales = parts["scales"]
    if 4 * parts["values"].shape[1] % scales.shape[1]:
        return None
    values = parts["values"].view(torch.uint8).view(*scales.shape, -1)
    return by_rows.Quantised(values, by_rows.stored(scales))
