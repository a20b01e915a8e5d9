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
from flashmoe.kernels.torch_threads import REORDERED, Threaded
from flashmoe.util.machine_code import helper

FEW = 6  # tokens; for more, a plain weight is worth making
Bits = Callable[[Any], Any]  # gives what some bits stand for, compiled or not


class Halves(NamedTuple):
    """How to read two numbers in a byte: times `unit` they are what its halves stand for."""

    low: Bits
    high: Bits
    unit: float = 1.0


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
    apart = x.mul(numbers.unit).view(*x.shape[:2], groups, half, 2).transpose(3, 4).contiguous()
    return _products(_halves_kernel(numbers, factor, half), rows, weights, apart)


def times_bytes(
    numbers: Bytes, factor: Bits, weights: Sequence[Quantised], x: torch.Tensor
) -> torch.Tensor:
    """x [many, n, in] float32 times weights of one number a byte: [many, n, out].

    factor: of a scale as it is stored.
    weights: alike; values uint8 [out, in], scales of blocks, which divide it evenly.
    """
    (rows, columns), (_, blocks) = weights[0].values.shape, weights[0].scales.shape
    kernel = _bytes_kernel(numbers, factor, columns // blocks)
    return _products(kernel, rows, weights, x.mul(numbers.unit).contiguous())


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
        values, scales, x, out = tensors
        for row in range(first, last):
            for token in range(x.shape[0]):
                total = np.float32(0)
                for group in range(values.shape[1]):
                    part = np.float32(0)
                    for k in range(half):
                        both = np.int32(values[row, group, k])
                        part += low(both) * x[token, group, 0, k]
                        part += high(both) * x[token, group, 1, k]
                    total += factor(scales[row, group]) * part
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


def _products(
    kernel: Threaded, rows: int, weights: Sequence[Quantised], x: torch.Tensor
) -> torch.Tensor:
    out = torch.empty(*x.shape[:2], rows)
    whole = [(values, scales.contiguous()) for values, scales in weights]
    kernel([(*w, *each) for w, *each in zip(whole, x, out, strict=True)], rows, LEAST_ROWS)
    return out
