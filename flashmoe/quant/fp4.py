"""FP4 as DeepSeek-V4's experts have it: two weights a byte along a row, beside dense FP8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from flashmoe.quant import by_rows, nibbles, plain
from flashmoe.quant.base import Parts
from flashmoe.quant.fp8 import FP8, are_blocks
from flashmoe.quant.mxfp4 import DOUBLED, E2M1, of_exponent
from flashmoe.quant.published import Kinds


class FP4(FP8):
    """The numbers of MXFP4 where config.json speaks of FP8, and under the same names."""

    name = "fp4"

    def accepts(self, kinds: Kinds, settings: Mapping[str, Any]) -> bool:
        (dtype, shape), (scale_dtype, blocks) = kinds["values"], kinds["scales"]
        return dtype == torch.int8 and are_blocks(scale_dtype, blocks, (shape[0], 2 * shape[-1]))

    def _plain(self, parts: Parts) -> torch.Tensor | None:
        if (groups := _by_group(parts)) is None:
            return None
        return plain.of_halves(DOUBLED, of_exponent, *groups)

    def _numbers(self, values: torch.Tensor) -> torch.Tensor:
        halves = nibbles.look_up(values.view(torch.uint8), E2M1, torch.float32)
        return torch.stack(list(halves), 2).flatten(1)

    def weight_products(self, x: torch.Tensor, many: Sequence[Parts]) -> torch.Tensor | None:
        weights = [groups for parts in many if (groups := _by_group(parts))]
        if len(weights) < len(many):
            return None
        return by_rows.times_halves(DOUBLED, of_exponent, weights, x)

    def weight_shape(self, parts: dict[str, tuple[int, ...]]) -> tuple[int, int]:
        rows, half = parts["values"]
        return rows, 2 * half


def _by_group(parts: Parts) -> by_rows.Quantised | None:
    """Values and scales of each row's groups; None where rows share scales, or these are floats."""
    values, scales = parts["values"].view(torch.uint8), parts["scales"]
    by_row = len(scales) == len(values) and values.shape[1] % scales.shape[1] == 0
    if not by_row or scales.dtype.itemsize != 1:
        return None
    return by_rows.Quantised(values.view(*scales.shape, -1), scales.view(torch.uint8))
