"""Memory for the plain weight of the moment, which is used again once nobody has that weight.

glibc would give each one new memory: up to version 2.37 an aligned block does not fit the hole
that the last one of its size has left.
"""

from __future__ import annotations

import math
import sys
import threading

import numpy as np
import torch

_KEPT = 4  # blocks that nobody uses
_UNUSED = 3  # references to one: the list's, the loop's and getrefcount's
_blocks: list[np.ndarray] = []
_lock = threading.Lock()


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """As torch.empty, on the CPU."""
    size_bytes = math.prod(shape) * dtype.itemsize
    with _lock:
        block = _unused_of(size_bytes)
        if block is None:
            _forget_unused()
            block = np.empty(size_bytes, np.uint8)
            _blocks.append(block)
        return torch.from_numpy(block).view(dtype).view(shape)


def _unused_of(size_bytes: int) -> np.ndarray | None:
    for block in _blocks:
        if block.nbytes == size_bytes and sys.getrefcount(block) == _UNUSED:
            return block
    return None


def _forget_unused() -> None:
    """But for the newest few."""
    unused = [block for block in _blocks if sys.getrefcount(block) == _UNUSED]
    gone = {id(block) for block in unused[: 1 - _KEPT]}
    _blocks[:] = [block for block in _blocks if id(block) not in gone]
