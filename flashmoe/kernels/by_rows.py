"""Multiplies a few tokens by a plain weight, row by row, in machine code that adds in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from flashmoe.kernels.torch_threads import REORDERED, Threaded
from flashmoe.util.machine_code import helper

_LEAST_ROWS = 64


@helper
def of_bfloat16(bits):
    """The float32 of a bfloat16 with these bits."""
    return np.int32(np.int32(bits) << 16).view(np.float32)


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [n, in] times a bfloat16 weight [out, in] in C order: float32 [n, out]."""
    out = torch.empty(len(x), len(weight))
    _products((weight, x.to(torch.float32).contiguous(), out), len(weight), _LEAST_ROWS)
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
