"""Makes bfloat16 numbers of two a byte, in the layout [in, out], by machine code."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch

from flashmoe.quant.by_rows import Bits
from flashmoe.quant.shares import in_shares
from flashmoe.util.machine_code import compiled

_LEAST_GROUPS = 8


def transposed(
    number: Bits, factor: Bits, values: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    """[in, out], bfloat16; the low half of a byte comes first.

    number: of 4 bits. factor: of a scale as it is stored; every product must be a bfloat16 number.
    values: uint8 [out, groups, in / groups / 2]. scales: [out, groups].
    """
    rows, groups, half = values.shape
    # so that machine code goes through all rows at once
    values, scales = values.permute(1, 2, 0).contiguous(), scales.T.contiguous()
    weight = torch.empty(groups * half * 2, rows, dtype=torch.bfloat16)
    arrays = values.numpy(), scales.numpy(), weight.view(torch.uint16).numpy()
    kernel = _kernel(number, factor)
    in_shares(lambda first, last: kernel(*arrays, first, last), groups, _LEAST_GROUPS)
    return weight


@cache
def _kernel(number: Bits, factor: Bits) -> Callable[..., None]:
    def numbers(values, scales, weight, first, last):
        factors = np.empty(values.shape[2], np.float32)
        for group in range(first, last):
            for row in range(len(factors)):
                factors[row] = factor(scales[group, row])
            for k in range(values.shape[1]):
                low = 2 * (group * values.shape[1] + k)
                for row in range(len(factors)):
                    both = np.int32(values[group, k, row])
                    product = np.float32(number(both & 15) * factors[row])
                    weight[low, row] = np.uint16(product.view(np.int32) >> 16)
                    product = np.float32(number(both >> 4) * factors[row])
                    weight[low + 1, row] = np.uint16(product.view(np.int32) >> 16)

    sources = [Path(inspect.getfile(function)) for function in (number, factor)]
    return compiled(numbers, number.__module__, (Path(__file__), *sources))
