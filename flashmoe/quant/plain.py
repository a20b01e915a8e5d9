"""Makes the bfloat16 numbers of quantised weights by machine code.

A number times its factor is computed in float32, and rounded to the nearest, as torch does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flashmoe.kernels.by_rows import LEAST_ROWS
from flashmoe.kernels.torch_threads import Threaded
from flashmoe.quant.by_rows import Bits, Bytes, Halves
from flashmoe.quant.plain_memory import empty
from flashmoe.util.machine_code import helper

_LEAST_GROUPS = 8


def of_halves(
    numbers: Halves, factor: Bits, values: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    """[out, in] of two numbers a byte, the first in the low half.

    factor: of a scale as it is stored.
    values: uint8 [out, groups, in / groups / 2]. scales: [out, groups].
    """
    rows, groups, half = values.shape
    weight = empty((rows, groups * half * 2), torch.bfloat16)
    kernel = _halves_kernel(numbers, factor, half)
    kernel([(values, scales.contiguous(), weight)], rows, LEAST_ROWS)
    return weight


def of_halves_transposed(
    numbers: Halves, factor: Bits, values: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    """As `of_halves`, but [in, out]."""
    rows, groups, half = values.shape
    weight = empty((groups * half * 2, rows), torch.bfloat16)
    kernel = _transposing_kernel(numbers, factor, half)
    kernel([(values, scales.T.contiguous(), weight)], groups, _LEAST_GROUPS)
    return weight


def of_bytes(
    numbers: Bytes, factor: Bits, values: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    """[out, in] of one number a byte.

    factor: of a scale as it is stored.
    values: uint8 [out, in]. scales: of blocks, which divide it evenly.
    """
    rows, columns = values.shape
    weight = empty((rows, columns), torch.bfloat16)
    kernel = _bytes_kernel(numbers, factor, columns // scales.shape[1])
    kernel([(values, scales.contiguous(), weight)], rows, LEAST_ROWS)
    return weight


@helper
def _rounded(number):
    """The bits of the bfloat16 nearest to a float32; of two, the even one."""
    bits = np.float32(number).view(np.int32)
    if bits & 0x7FFFFFFF > 0x7F800000:
        return np.uint16(0x7FC0)  # no number
    return np.uint16((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)


@cache
def _halves_kernel(numbers: Halves, factor: Bits, half: int) -> Threaded:
    low, high = numbers.low, numbers.high
    unit, offset = np.float32(numbers.unit), np.float32(numbers.offset)

    def make_plain(tensors, first, last):
        values, scales, weight = tensors
        for row in range(first, last):
            for group in range(values.shape[1]):
                scale = np.float32(factor(scales[row, group]))
                start = 2 * half * group
                for k in range(half):
                    both = np.int32(values[row, group, k])
                    weight[row, start + 2 * k] = _rounded((low(both) * unit - offset) * scale)
                    weight[row, start + 2 * k + 1] = _rounded((high(both) * unit - offset) * scale)

    return _threaded(make_plain, low, high, factor)


@cache
def _transposing_kernel(numbers: Halves, factor: Bits, half: int) -> Threaded:
    low_half, high_half = numbers.low, numbers.high
    unit, offset = np.float32(numbers.unit), np.float32(numbers.offset)

    def make_plain(tensors, first, last):
        values, scales, weight = tensors
        rows = values.shape[0]
        across = np.empty((half, rows), np.uint8)  # a group's bytes, for all rows at once
        factors = np.empty(rows, np.float32)
        for group in range(first, last):
            for row in range(rows):
                factors[row] = factor(scales[group, row])
                for k in range(half):
                    across[k, row] = values[row, group, k]
            for k in range(half):
                low = 2 * (group * half + k)
                for row in range(rows):
                    both = np.int32(across[k, row])
                    weight[low, row] = _rounded((low_half(both) * unit - offset) * factors[row])
                    weight[low + 1, row] = _rounded(
                        (high_half(both) * unit - offset) * factors[row]
                    )

    return _threaded(make_plain, numbers.low, numbers.high, factor)


@cache
def _bytes_kernel(numbers: Bytes, factor: Bits, wide: int) -> Threaded:
    number, unit = numbers.number, np.float32(numbers.unit)

    def make_plain(tensors, first, last):
        values, scales, weight = tensors
        tall = values.shape[0] // scales.shape[0]
        for row in range(first, last):
            for block in range(scales.shape[1]):
                scale = np.float32(factor(scales[row // tall, block]))
                for k in range(block * wide, (block + 1) * wide):
                    weight[row, k] = _rounded(number(np.int32(values[row, k])) * unit * scale)

    return _threaded(make_plain, number, factor)


def _threaded(make_plain: Callable[..., None], *functions: Any) -> Threaded:
    sources = [Path(inspect.getfile(function)) for function in functions]
    return Threaded(make_plain, functions[0].__module__, (Path(__file__), *sources))
