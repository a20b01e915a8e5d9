"""Multiplies a few tokens by weights that lie quantised row by row, without making them plain.

Machine code turns each number of a row into float32 as it needs it, and adds in float32. A row's
result depends on its parts and on the token alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from flashmoe.kernels.by_rows import LEAST_ROWS, of_bfloat16
from flashmoe.kernels.torch_threads import REORDERED, Tensors, Threaded
from flashmoe.util.machine_code import helper

FEW = 6  # tokens; for more, a plain weight is worth making
Bits = Callable[[Any], Any]  # gives what some bits stand for, compiled or not


class Halves(NamedTuple):
    """How to read two numbers in a byte: times `unit`, less `offset`, its halves stand for them."""

    low: Bits
    high: Bits
    unit: float = 1.0
    offset: float = 0.0


class Quantised(NamedTuple):
    """A weight as it lies."""

    values: torch.Tensor
    scales: torch.Tensor


class Bytes(NamedTuple):
    """How to read a number of a byte: times `unit` it is what the byte stands for."""

    number: Bits
    unit: float = 1.0


def times_halves(
    numbers: Halves, factor: Bits, weights: Sequence[Quantised], x: torch.Tensor
) -> torch.Tensor:
    """x [many, n, in] float32 times weights of two numbers a byte, the first in the low half.

    factor: of a scale as it is stored.
    weights: alike; values uint8 [out, groups, in / groups / 2], scales [out, groups].
    Returns [many, n, out].
    """
    rows, groups, half = weights[0].values.shape
    by_group = x.reshape(*x.shape[:2], groups, 2 * half)
    apart = by_group.mul(numbers.unit).view(*by_group.shape[:3], half, 2).transpose(3, 4)
    offsets = by_group.sum(3).mul_(numbers.offset)
    kernel = _halves_kernel(numbers, factor, half)
    return products(kernel, rows, weights, apart.contiguous(), offsets)


def times_bytes(
    numbers: Bytes, factor: Bits, weights: Sequence[Quantised], x: torch.Tensor
) -> torch.Tensor:
    """x [many, n, in] float32 times weights of one number a byte: [many, n, out].

    factor: of a scale as it is stored.
    weights: alike; values uint8 [out, in], scales of blocks, which divide it evenly.
    """
    (rows, columns), (_, blocks) = weights[0].values.shape, weights[0].scales.shape
    kernel = _bytes_kernel(numbers, factor, columns // blocks)
    return products(kernel, rows, weights, x.mul(numbers.unit).contiguous())


def stored(scales: torch.Tensor) -> torch.Tensor:
    """Scales of any dtype as machine code takes them: bytes, bfloat16 or float32."""
    if scales.dtype.itemsize == 1:
        return scales.view(torch.uint8)
    return scales if scales.dtype == torch.bfloat16 else scales.to(torch.float32)


def factor_of(scales: torch.Tensor) -> Bits:
    """What gives the factors of such scales that are floats."""
    return of_bfloat16 if scales.dtype == torch.bfloat16 else _as_it_is


@helper
def _as_it_is(scale):
    return scale


# The width of a group is a constant of the machine code: numba unrolls no other one.


@cache
def _halves_kernel(numbers: Halves, factor: Bits, half: int) -> Threaded:
    low, high = numbers.low, numbers.high

    def products(tensors, first, last):
        values, scales, x, offsets, out = tensors
        # for each byte of a group, and in turn, so that many are added at once
        sums = np.empty((2, half), np.float32)
        for row in range(first, last):
            for token in range(x.shape[0]):
                sums[:] = 0
                offset = np.float32(0)
                for group in range(values.shape[1]):
                    scale = np.float32(factor(scales[row, group]))
                    offset += scale * offsets[token, group]
                    for k in range(half):
                        both = np.int32(values[row, group, k])
                        pair = low(both) * x[token, group, 0, k]
                        pair += high(both) * x[token, group, 1, k]
                        sums[group & 1, k] += scale * pair
                total = -offset
                for k in range(half):
                    total += sums[0, k] + sums[1, k]
                out[token, row] = total

    return Threaded(products, low.__module__, _sources(low, high, factor), REORDERED)


@cache
def _bytes_kernel(numbers: Bytes, factor: Bits, wide: int) -> Threaded:
    number = numbers.number

    def products(tensors, first, last):
        values, scales, x, out = tensors
        tall = values.shape[0] // scales.shape[0]
        for row in range(first, last):
            for token in range(x.shape[0]):
                total = np.float32(0)
                for block in range(scales.shape[1]):
                    part = np.float32(0)
                    for k in range(block * wide, (block + 1) * wide):
                        part += number(np.int32(values[row, k])) * x[token, k]
                    total += factor(scales[row // tall, block]) * part
                out[token, row] = total

    return Threaded(products, number.__module__, _sources(number, factor), REORDERED)


def _sources(*functions: Bits) -> tuple[Path, ...]:
    return Path(__file__), *(Path(inspect.getfile(function)) for function in functions)


def products(
    kernel: Threaded,
    rows: int,
    weights: Sequence[Tensors],
    *of_tokens: torch.Tensor,
    rows_at_once: int = 1,
) -> torch.Tensor:
    """What a kernel makes of weights that have so many rows: [many, n, rows].

    of_tokens: what it takes besides a weight, [many, n, ...]. rows_at_once: which a thread cannot
    share with another.
    """
    out = torch.empty(*of_tokens[0].shape[:2], rows)
    whole = [tuple(part.contiguous() for part in weight) for weight in weights]
    each = zip(whole, *of_tokens, out, strict=True)
    kernel(
        [(*weight, *tensors) for weight, *tensors in each],
        rows // rows_at_once,
        LEAST_ROWS // rows_at_once,
    )
    return out
