"""Runs machine code on the threads that torch itself computes with.

Threads of our own would compete with torch's, which spin for a while after each of its operations.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from numba.extending import register_jitable

from flashmoe.util import by_address
from flashmoe.util.by_address import c_function, call, view

Kinds = tuple[tuple[torch.dtype, int], ...]  # dtype and dimensions of each tensor
# Sums may be taken in another order than they are written in, but always in the same one.
REORDERED = frozenset({"reassoc", "contract", "nsz"})
_SOURCES = (Path(__file__), Path(by_address.__file__))


class Threaded:
    """A function of tensors that computes a range of its results, compiled for all threads.

    Calling it computes all `count` results. Each thread takes one share of them.
    """

    def __init__(
        self,
        body: Callable[[Any, int, int], None],
        name: str,
        sources: tuple[Path, ...],
        fastmath: frozenset[str] = frozenset(),
    ) -> None:
        """body(tensors, first, last): what numba compiles; tensors are arrays in C order there.

        bfloat16 and float8 are their bits there. name, sources: as for `machine_code.keep`.
        fastmath: as for `machine_code.compiled`.
        """
        self._body = register_jitable(fastmath=set(fastmath))(body)
        self._name = name
        self._sources = (*_SOURCES, *sources)
        self._by_kinds: dict[Kinds, Any] = {}

    def __call__(self, tensors: tuple[torch.Tensor, ...], count: int, least: int) -> None:
        """least: fewer results than that are not worth handing to another thread."""
        code = self._code(tensors)
        words: list[int] = []
        for tensor in tensors:
            assert tensor.is_contiguous()
            words += tensor.data_ptr(), *tensor.shape
        run, thread_number = _openmp()
        shares = max(1, min(torch.get_num_threads(), count // least)) if run else 1
        words += count, shares, thread_number if shares > 1 else 0
        table = (ctypes.c_int64 * len(words))(*words)
        if shares > 1:
            run(code.address, table, shares, 0)
        else:
            code(table)

    def _code(self, tensors: tuple[torch.Tensor, ...]) -> Any:
        kinds = tuple((tensor.dtype, tensor.dim()) for tensor in tensors)
        if kinds not in self._by_kinds:
            arrays = tuple(_bits(torch.empty([1] * n, dtype=dtype)).numpy() for dtype, n in kinds)
            state = (arrays, 0, 0, 0)
            self._by_kinds[kinds] = c_function(_share(self._body), state, self._name, self._sources)
        return self._by_kinds[kinds]


def _share(body: Any) -> Any:
    """What each thread runs."""

    def share(at):  # type: ignore[no-untyped-def]
        tensors, count, shares, thread_number = view(at)
        number = 0
        if thread_number:
            number = call(thread_number, ()) & 0xFFFF  # of its result only an int counts
        body(tensors, count * number // shares, count * (number + 1) // shares)
        return 0

    return share


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same bytes in a dtype that numpy has."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16)
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


@cache
def _openmp() -> tuple[Any, int]:
    """OpenMP's own call for a parallel region in torch's copy of it, and its thread's number.

    (None, 0) where torch has no OpenMP that gives them: then one thread computes all.
    """
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        run, number = library.GOMP_parallel, library.omp_get_thread_num
    except (OSError, AttributeError):
        return None, 0
    run.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
    run.restype = None
    return run, ctypes.cast(number, ctypes.c_void_p).value or 0
