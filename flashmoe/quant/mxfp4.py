"""MXFP4 as gpt-oss is published: 4 bits a weight (E2M1), and an exponent for each 32 of a row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from flashmoe.quant import by_rows, nibbles, plain
from flashmoe.quant.base import Parts
from flashmoe.quant.published import Kinds, Published
from flashmoe.quant.small_floats import E2M1_UNIT, high_e2m1, low_e2m1
from flashmoe.util.machine_code import helper

GROUP = 32  # weights that share an exponent
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = (*_POSITIVE, *(-number for number in _POSITIVE))  # what 4 bits stand for
_DEVIATION = math.sqrt(sum(number**2 for number in E2M1) / len(E2M1))
# The numbers are doubled, so that the largest exponent's factor is finite.
_DOUBLED, _BIAS = tuple(2 * number for number in E2M1), 128


class MXFP4(Published):
    """Two weights a byte along a row, the first in the low half."""

    name = "mxfp4"
    method = "mxfp4"
    endings: ClassVar = {"blocks": "_blocks", "scales": "_scales"}

    def accepts(self, kinds: Kinds, settings: Mapping[str, Any]) -> bool:
        (dtype, blocks), (scale_dtype, scales) = kinds["blocks"], kinds["scales"]
        bytes_ = {dtype, scale_dtype} == {torch.uint8}
        return bytes_ and len(scales) == 2 and blocks == (*scales, GROUP // 2)

    def weight(self, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        """As `Published.weight`; it lies in memory as gpt-oss's modules want it, [in, out]."""
        if dtype == torch.bfloat16 and parts["blocks"].device.type == "cpu":
            return plain.of_halves_transposed(
                DOUBLED, of_exponent, parts["blocks"], parts["scales"]
            ).T
        rows, groups, half = parts["blocks"].shape
        factors = (parts["scales"].to(torch.float32) - _BIAS).exp2()
        factors = factors.T.contiguous()[:, None, :]  # [groups, 1, out]
        blocks = parts["blocks"].permute(1, 2, 0).contiguous()
        weight = torch.empty(groups, half, 2, rows, dtype=dtype, device=blocks.device)
        for number, values in enumerate(nibbles.look_up(blocks, _DOUBLED, dtype)):
            torch.mul(values, factors, out=weight[:, :, number])
        return weight.view(groups * half * 2, rows).T

    def random(self, rows: int, columns: int, generator: torch.Generator) -> Parts | None:
        if columns % GROUP:
            return None
        exponent = 127 - round(math.log2(_DEVIATION * math.sqrt(columns)))
        shape = rows, columns // GROUP
        blocks = torch.randint(0, 256, (*shape, GROUP // 2), dtype=torch.uint8, generator=generator)
        return {"blocks": blocks, "scales": torch.full(shape, exponent, dtype=torch.uint8)}

    def weight_products(self, x: torch.Tensor, many: Sequence[Parts]) -> torch.Tensor:
        weights = [by_rows.Quantised(parts["blocks"], parts["scales"]) for parts in many]
        return by_rows.times_halves(DOUBLED, of_exponent, weights, x)

    def weight_shape(self, parts: dict[str, tuple[int, ...]]) -> tuple[int, int]:
        rows, groups, half = parts["blocks"]
        return rows, 2 * groups * half


_FACTORS = (torch.arange(256, dtype=torch.float32) - _BIAS).exp2().numpy()
DOUBLED = by_rows.Halves(low_e2m1, high_e2m1, 2 * E2M1_UNIT)


@helper
def of_exponent(bits):
    """The factor of numbers that are doubled."""
    return _FACTORS[bits]
