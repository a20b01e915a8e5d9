"""Multiplies a few tokens by weights that lie quantised row by row, without making them plain.

Machine code turns each number of a row into float32 as it needs it, and adds in float32. A row's
result depends on its parts and on the token alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flashmoe.quant.shares import in_shares
from flashmoe.util.machine_code import compiled, helper

FEW = 3  # tokens; for more, a plain weight is worth making
_LEAST_ROWS = 256
# Sums may be taken in another order than they are written in, but always in the same one.
_REORDERED = frozenset({"reassoc", "contract", "nsz"})
Bits = Callable[[Any], Any]  # gives what some bits stand for, compiled or not


def times_halves(
    number: Bits, factor: Bits, values: torch.Tensor, scales: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    """x [n, in] float32 times a weight of two numbers a byte, the first in the low half: [n, out].

    number: of 4 bits. factor: of a scale as it is stored.
    values: uint8 [out, groups, in / groups / 2]. scales: [out, groups].
    """
    rows, groups, half = values.shape
    apart = x.view(len(x), groups, half, 2).transpose(2, 3).contiguous()
    return _product(_halves_kernel(number, factor), rows, values, scales, apart)


def times_bytes(
    number: Bits, factor: Bits, values: torch.Tensor, scales: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    """x [n, in] float32 times a weight of one number a byte: [n, out].

    number: of 8 bits. factor: of a scale as it is stored.
    values: uint8 [out, in]. scales: of blocks, which divide it evenly.
    """
    return _product(_bytes_kernel(number, factor), len(values), values, scales, x.contiguous())


def stored(scales: torch.Tensor) -> tuple[torch.Tensor, Bits]:
    """Floats of any dtype as machine code takes them, and what gives their factors.

    Large tensors are not cast here: torch's threads would spin on for a while, and take the
    processor from those of this module.
    """
    if scales.dtype == torch.bfloat16:
        return scales.view(torch.uint16), _of_bfloat16
    return scales.to(torch.float32), _as_it_is


@helper
def _as_it_is(scale):
    return scale


@helper
def _of_bfloat16(bits):
    return np.int32(np.int32(bits) << 16).view(np.float32)


@cache
def _halves_kernel(number: Bits, factor: Bits) -> Callable[..., None]:
    def products(values, scales, x, out, first, last):
        for token in range(len(x)):
            for row in range(first, last):
                total = np.float32(0)
                for group in range(values.shape[1]):
                    part = np.float32(0)
                    for k in range(values.shape[2]):
                        both = np.int32(values[row, group, k])
                        part += number(both & 15) * x[token, group, 0, k]
                        part += number(both >> 4) * x[token, group, 1, k]
                    total += factor(scales[row, group]) * part
                out[token, row] = total

    return compiled(products, number.__module__, _sources(number, factor), _REORDERED)


@cache
def _bytes_kernel(number: Bits, factor: Bits) -> Callable[..., None]:
    def products(values, scales, x, out, first, last):
        tall, wide = values.shape[0] // len(scales), values.shape[1] // scales.shape[1]
        for token in range(len(x)):
            for row in range(first, last):
                total = np.float32(0)
                for block in range(scales.shape[1]):
                    part = np.float32(0)
                    for k in range(block * wide, (block + 1) * wide):
                        part += number(np.int32(values[row, k])) * x[token, k]
                    total += factor(scales[row // tall, block]) * part
                out[token, row] = total

    return compiled(products, number.__module__, _sources(number, factor), _REORDERED)


def _sources(*functions: Bits) -> tuple[Path, ...]:
    return Path(__file__), *(Path(inspect.getfile(function)) for function in functions)


def _product(
    products: Callable[..., None],
    rows: int,
    values: torch.Tensor,
    scales: torch.Tensor,
    x: torch.Tensor,
) -> torch.Tensor:
    out = torch.empty(len(x), rows)
    arrays = [tensor.numpy() for tensor in (values, scales.contiguous(), x, out)]
    in_shares(lambda first, last: products(*arrays, first, last), rows, _LEAST_ROWS)
    return out
