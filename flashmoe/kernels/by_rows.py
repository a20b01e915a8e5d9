"""Multiplies a few tokens by a plain weight, row by row, in machine code that adds in float32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from flashmoe.kernels.torch_threads import REORDERED, Threaded
from flashmoe.util.machine_code import helper

LEAST_ROWS = 64  # a thread is woken for


@helper
def of_bfloat16(bits):
    """The float32 of a bfloat16 with these bits."""
    return np.int32(np.int32(bits) << 16).view(np.float32)


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [n, in] times a bfloat16 weight [out, in] in C order: float32 [n, out]."""
    return products(x[None], [weight])[0]


def products(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """As `product`, of many weights of one shape at once: x [many, n, in] -> [many, n, out]."""
    rows = len(weights[0])
    x = x.to(torch.float32)
    out = torch.empty(*x.shape[:2], rows)
    _products(list(zip(weights, x, out, strict=True)), rows, LEAST_ROWS)
    return out


def _dot_products(tensors, first, last):
    """Of two rows at once, far apart, because memory then sends more."""
    weight, x, out = tensors
    half = (last - first + 1) // 2
    for i in range(half):
        # the last row of an odd number is its own partner, so that its sum has the same order
        row, other = first + i, min(first + half + i, last - 1)
        for token in range(x.shape[0]):
            total = np.float32(0)
            other_total = np.float32(0)
            for k in range(x.shape[1]):
                number = x[token, k]
                total += of_bfloat16(weight[row, k]) * number
                other_total += of_bfloat16(weight[other, k]) * number
            out[token, row] = total
            out[token, other] = other_total


_products = Threaded(_dot_products, __name__, (Path(__file__),), REORDERED)
