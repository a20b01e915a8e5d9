"""The memory of one expert's pages becomes that of another's, in machine code."""

from __future__ import annotations

from mmap import MADV_DONTNEED

from numba import types

_MOVE = 1 | 2 | 4  # MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP (Linux 5.7)

_mremap = types.ExternalFunction(
    "mremap", types.intp(types.intp, types.intp, types.intp, types.int32, types.intp)
)
_madvise = types.ExternalFunction("madvise", types.int32(types.intp, types.intp, types.int32))


def move_pages(given, wanted):
    """Move what `wanted` needs of `given`, and give back the rest.

    Both are [n, 2] int64: addresses, from and to, of tensors of the same kinds. Where the kernel
    cannot do that, or has no more maps, all is given back.
    """
    for i in range(len(given)):
        start, end = given[i]
        size = min(end - start, wanted[i, 1] - wanted[i, 0])
        if size > 0 and _mremap(start, size, size, _MOVE, wanted[i, 0]) != -1:
            start += size
        if end > start:
            _madvise(start, end - start, MADV_DONTNEED)
