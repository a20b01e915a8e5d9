"""Looks up what the halves of bytes, 4 bits each, stand for."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # dtypes of scales
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # of numbers of so many bytes


def look_up(
    values: torch.Tensor, numbers: tuple[float, ...], dtype: torch.dtype
) -> Iterator[torch.Tensor]:
    """What the low halves of bytes (uint8) stand for, then the high ones, each in values' shape.

    numbers: of the bits 0 to 15.
    """
    flat = values.reshape(-1).int()
    for table in _tables(numbers, dtype, values.device):
        yield table.index_select(0, flat).view(dtype).view(values.shape)


@cache
def _tables(
    numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """[256] each: by byte, the number of its low half and that of its high one, as words."""
    known = torch.tensor(numbers, dtype=dtype).view(_WORDS[dtype.itemsize])
    byte = torch.arange(256)
    return known[byte % 16].to(device), known[byte // 16].to(device)
