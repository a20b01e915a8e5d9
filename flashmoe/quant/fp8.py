"""FP8 in blocks: a byte a weight (E4M3), and a factor for each block of rows and columns.

As DeepSeek-V3 is published, and whatever is called -FP8 after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from flashmoe.quant import by_rows
from flashmoe.quant.base import Parts
from flashmoe.quant.published import Kinds, Published
from flashmoe.util.machine_code import helper

_BIAS = 127  # of an exponent that is stored as a byte


class FP8(Published):
    """The factor is a float, or a power of two by its exponent alone (E8M0)."""

    name = "fp8"
    method = "fp8"
    endings: ClassVar = {"values": ".weight", "scales": ".weight_scale_inv"}
    unused = (".activation_scale",)

    def accepts(self, kinds: Kinds, settings: Mapping[str, Any]) -> bool:
        (dtype, shape), (_, blocks) = kinds["values"], kinds["scales"]
        if dtype != torch.float8_e4m3fn or not are_blocks(blocks, shape):
            return False
        wanted = settings.get("weight_block_size") or (0, 0)
        return all(  # a last block that is smaller than the others is not known by the shapes
            count == 1 or size // count == block
            for count, size, block in zip(blocks, shape, wanted, strict=True)
        )

    def weight(self, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        return times_blocks(parts["values"].to(torch.float32), parts["scales"], dtype)

    def few(self, x: torch.Tensor, parts: Parts) -> torch.Tensor:
        values = parts["values"].view(torch.uint8)
        scales, factor = by_rows.stored(factors_of(parts["scales"]))
        return by_rows.whole_bytes(_number, factor, values, scales, x)

    def weight_shape(self, parts: dict[str, tuple[int, ...]]) -> tuple[int, int]:
        rows, columns = parts["values"]
        return rows, columns


def are_blocks(blocks: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Do factors of shape `blocks` divide a weight evenly?"""
    return (
        len(blocks) == len(shape) == 2 and shape[0] % blocks[0] == 0 and shape[1] % blocks[1] == 0
    )


def times_blocks(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """values [out, in], float32, are overwritten; scales [rows, columns] of blocks."""
    factors = factors_of(scales)
    rows, columns = factors.shape
    blocks = values.view(rows, values.shape[0] // rows, columns, values.shape[1] // columns)
    return blocks.mul_(factors[:, None, :, None]).view(values.shape).to(dtype)


def factors_of(scales: torch.Tensor) -> torch.Tensor:
    """As float32; bytes are exponents."""
    factors = scales.to(torch.float32)
    return (factors - _BIAS).exp2() if scales.dtype == torch.uint8 else factors


_NUMBERS = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).to(torch.float32).numpy()


@helper
def _number(bits):
    return _NUMBERS[bits]
