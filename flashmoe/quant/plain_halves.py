"""Makes bfloat16 numbers of two a byte, in the layout [in, out], by machine code."""

from __future__ import annotations

import inspect
from functools import cache
from pathlib import Path

import numpy as np
import torch

from flashmoe.kernels.torch_threads import Threaded
from flashmoe.quant.by_rows import Bits, Halves

_LEAST_GROUPS = 8


def transposed(
    numbers: Halves, factor: Bits, values: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    """[in, out], bfloat16; the low half of a byte comes first.

    factor: of a scale as it is stored; every number times it must be a bfloat16 number.
    values: uint8 [out, groups, in / groups / 2]. scales: [out, groups].
    """
    rows, groups, half = values.shape
    # so that machine code goes through all rows at once
    values, scales = values.permute(1, 2, 0).contiguous(), scales.T.contiguous()
    weight = torch.empty(groups * half * 2, rows, dtype=torch.bfloat16)
    kernel = _kernel(numbers, factor)
    kernel([(values, scales, weight)], groups, _LEAST_GROUPS)
    return weight


@cache
def _kernel(numbers: Halves, factor: Bits) -> Threaded:
    low_half, high_half, unit = numbers.low, numbers.high, np.float32(numbers.unit)

    def make_plain(tensors, first, last):
        values, scales, weight = tensors
        rows = values.shape[2]
        factors = np.empty(rows, np.float32)
        for group in range(first, last):
            for row in range(rows):
                factors[row] = factor(scales[group, row])
            for k in range(values.shape[1]):
                low = 2 * (group * values.shape[1] + k)
                for row in range(rows):
                    both = np.int32(values[group, k, row])
                    product = np.float32(low_half(both) * unit * factors[row])
                    weight[low, row] = np.uint16(product.view(np.int32) >> 16)
                    product = np.float32(high_half(both) * unit * factors[row])
                    weight[low + 1, row] = np.uint16(product.view(np.int32) >> 16)

    functions = numbers.low, numbers.high, factor
    sources = [Path(inspect.getfile(function)) for function in functions]
    return Threaded(make_plain, numbers.low.__module__, (Path(__file__), *sources))
