"""Multiplies a few tokens by weights that lie quantised row by row, without making them plain.

Machine code turns each number of a row into float32 as it needs it, and adds in float32. A row's
result depends on its parts and on the token alone.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flashmoe.util.machine_code import compiled

FEW = 8  # tokens; for more, a plain weight is worth making
_ROWS = 256  # fewer are not worth handing to another thread
# Sums may be taken in another order than they are written in, but always in the same one.
_REORDERED = frozenset({"reassoc", "contract", "nsz"})
Number = Callable[[Any], Any]  # what some bits stand for


def halves(
    number: Number, values: torch.Tensor, factors: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    """x [n, in] float32 times a weight of two numbers a byte, the first in the low half: [n, out].

    number: of 4 bits. values: uint8 [out, groups, in / groups / 2]. factors: float32 [out, groups].
    """
    rows, groups, half = values.shape
    apart = x.view(len(x), groups, half, 2).transpose(2, 3).contiguous()
    return _in_threads(_halves_kernel(number), rows, values, factors, apart)


def whole_bytes(
    number: Number, values: torch.Tensor, factors: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    """x [n, in] float32 times a weight of one number a byte: [n, out].

    number: of 8 bits. values: uint8 [out, in]. factors: float32, of blocks, which divide it evenly.
    """
    return _in_threads(_bytes_kernel(number), len(values), values, factors, x.contiguous())


@cache
def _halves_kernel(number: Number) -> Callable[..., None]:
    def products(values, factors, x, out, first, last):
        for token in range(len(x)):
            for row in range(first, last):
                total = np.float32(0)
                for group in range(values.shape[1]):
                    part = np.float32(0)
                    for k in range(values.shape[2]):
                        both = np.int32(values[row, group, k])
                        part += number(both & 15) * x[token, group, 0, k]
                        part += number(both >> 4) * x[token, group, 1, k]
                    total += factors[row, group] * part
                out[token, row] = total

    return compiled(products, number.__module__, _sources(number), _REORDERED)


@cache
def _bytes_kernel(number: Number) -> Callable[..., None]:
    def products(values, factors, x, out, first, last):
        tall, wide = values.shape[0] // len(factors), values.shape[1] // factors.shape[1]
        for token in range(len(x)):
            for row in range(first, last):
                total = np.float32(0)
                for block in range(factors.shape[1]):
                    part = np.float32(0)
                    for k in range(block * wide, (block + 1) * wide):
                        part += number(np.int32(values[row, k])) * x[token, k]
                    total += factors[row // tall, block] * part
                out[token, row] = total

    return compiled(products, number.__module__, _sources(number), _REORDERED)


def _sources(number: Number) -> tuple[Path, ...]:
    return Path(__file__), Path(inspect.getfile(number))


def _in_threads(
    products: Callable[..., None],
    rows: int,
    values: torch.Tensor,
    factors: torch.Tensor,
    x: torch.Tensor,
) -> torch.Tensor:
    """As many as torch computes with, this one among them."""
    out = torch.empty(len(x), rows)
    arrays = [tensor.numpy() for tensor in (values, factors.contiguous(), x, out)]
    shares = max(1, min(torch.get_num_threads(), rows // _ROWS))
    ours, *rest = pairwise(rows * share // shares for share in range(shares + 1))
    others = [_threads(os.getpid()).submit(products, *arrays, *bounds) for bounds in rest]
    products(*arrays, *ours)
    for other in others:
        other.result()
    return out


@cache
def _threads(process: int) -> ThreadPoolExecutor:
    """process: its number, for a forked child has none of its parent's threads."""
    return ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1), "flashmoe-rows")
