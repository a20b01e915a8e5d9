"""FP8 in blocks: a byte a weight (E4M3), and a factor for each block of rows and columns.

As DeepSeek-V3 is published, and whatever is called -FP8 after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from flashmoe.quant import by_rows, plain
from flashmoe.quant.base import Parts
from flashmoe.quant.published import Kinds, Published
from flashmoe.quant.small_floats import E4M3_UNIT, e4m3
from flashmoe.util.machine_code import helper

_BIAS = 127  # of an exponent that is stored as a byte
_EXPONENTS = torch.uint8, torch.float8_e8m0fnu
_SCALES = (*_EXPONENTS, torch.float32, torch.bfloat16, torch.float16)
_BLOCK = (128, 128)  # where config.json names none, as transformers has it


class FP8(Published):
    """The factor is a float, or a power of two by its exponent alone (E8M0)."""

    name = "fp8"
    method = "fp8"
    endings: ClassVar = {"values": ".weight", "scales": ".weight_scale_inv"}
    unused = (".activation_scale",)

    def accepts(self, kinds: Kinds, settings: Mapping[str, Any]) -> bool:
        (dtype, shape), (scale_dtype, blocks) = kinds["values"], kinds["scales"]
        if dtype != torch.float8_e4m3fn or not are_blocks(scale_dtype, blocks, shape):
            return False
        if not settings:
            return True
        wanted = settings.get("weight_block_size", _BLOCK) or (0, 0)
        return all(  # a last block that is smaller than the others is not known by the shapes
            count == 1 or size // count == block
            for count, size, block in zip(blocks, shape, wanted, strict=True)
        )

    def weight(self, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        on_cpu = parts["values"].device.type == "cpu"
        if dtype == torch.bfloat16 and on_cpu and (made := self._plain(parts)) is not None:
            return made
        values = self._numbers(parts["values"])  # [out, in]
        factors = _factors(parts["scales"])
        rows, columns = factors.shape
        blocks = values.view(rows, values.shape[0] // rows, columns, values.shape[1] // columns)
        return blocks.mul_(factors[:, None, :, None]).view(values.shape).to(dtype)

    def _plain(self, parts: Parts) -> torch.Tensor | None:
        """In bfloat16, by machine code; None where there is none for it."""
        scales = by_rows.stored(parts["scales"])
        return plain.of_bytes(_BYTES, _factor_of(scales), parts["values"].view(torch.uint8), scales)

    def _numbers(self, values: torch.Tensor) -> torch.Tensor:
        """What the stored values stand for, in float32, to be overwritten."""
        return values.to(torch.float32)

    def random(self, rows: int, columns: int, generator: torch.Generator) -> Parts | None:
        if rows % _BLOCK[0] or columns % _BLOCK[1]:
            return None
        values = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
        shape = rows // _BLOCK[0], columns // _BLOCK[1]
        return {"values": values, "scales": torch.full(shape, columns**-0.5)}

    def weight_products(self, x: torch.Tensor, many: Sequence[Parts]) -> torch.Tensor | None:
        weights = [
            by_rows.Quantised(parts["values"].view(torch.uint8), by_rows.stored(parts["scales"]))
            for parts in many
        ]
        return by_rows.times_bytes(_BYTES, _factor_of(weights[0].scales), weights, x)

    def weight_shape(self, parts: dict[str, tuple[int, ...]]) -> tuple[int, int]:
        rows, columns = parts["values"]
        return rows, columns


def are_blocks(dtype: torch.dtype, blocks: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """May factors of this dtype and of shape `blocks` divide a weight evenly?"""
    if dtype not in _SCALES or not len(blocks) == len(shape) == 2 or not all(blocks):
        return False
    return shape[0] % blocks[0] == 0 and shape[1] % blocks[1] == 0


def _factors(scales: torch.Tensor) -> torch.Tensor:
    """As float32; bytes are exponents."""
    factors = scales.to(torch.float32)
    return (factors - _BIAS).exp2() if scales.dtype == torch.uint8 else factors


_FACTORS = (torch.arange(256, dtype=torch.float32) - _BIAS).exp2().numpy()


@helper
def _of_exponent(bits):
    return _FACTORS[bits]


def _factor_of(scales: torch.Tensor) -> by_rows.Bits:
    """What gives the factors of scales that are stored so."""
    return _of_exponent if scales.dtype == torch.uint8 else by_rows.factor_of(scales)


_NAN = 127  # with or without the sign's bit


@helper
def _number(byte):
    return np.float32(np.nan) if byte & 127 == _NAN else e4m3(byte)


_BYTES = by_rows.Bytes(_number, E4M3_UNIT)
