"""Runs machine code on the threads that torch itself computes with.

Threads of our own would compete with torch's, which spin for a while after each of its operations.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from numba.extending import register_jitable

from flashmoe.util import by_address
from flashmoe.util.by_address import c_function, call, view

Tensors = tuple[torch.Tensor, ...]
Kinds = tuple[tuple[torch.dtype, int], ...]  # dtype and dimensions of each tensor
# Sums may be taken in another order than they are written in, but always in the same one.
REORDERED = frozenset({"reassoc", "contract", "nsz"})
_SOURCES = (Path(__file__), Path(by_address.__file__))


class Threaded:
    """A function of tensors that computes a range of its results, compiled for all threads."""

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

    def __call__(self, many: Sequence[Tensors], count: int, least: int) -> None:
        """Compute all `count` results for each of many tensors, which are alike.

        Each thread takes one share of the results, of all of them.
        least: fewer than that are not worth handing to another thread.
        """
        words = [word for tensors in many for word in _words(tensors)]
        tables = (ctypes.c_int64 * len(words))(*words)
        run, *asked = _openmp()
        threads = max(1, min(torch.get_num_threads(), count * len(many) // least)) if run else 1
        state = (ctypes.c_int64 * 7)(
            self._code(many[0]).address, ctypes.addressof(tables), len(many),
            len(words) // len(many), count, *(asked if threads > 1 else (0, 0)),
        )  # fmt: skip
        share = _compiled_share()
        if threads > 1:
            run(share.address, state, threads, 0)
        else:
            share(state)

    def _code(self, tensors: Tensors) -> Any:
        kinds = tuple((tensor.dtype, tensor.dim()) for tensor in tensors)
        if kinds not in self._by_kinds:
            state = tuple(_bits(torch.empty([1] * n, dtype=dtype)).numpy() for dtype, n in kinds)
            work = _work(self._body)
            self._by_kinds[kinds] = c_function(work, state, self._name, self._sources, words=2)
        return self._by_kinds[kinds]


def _words(tensors: Tensors) -> Iterator[int]:
    """The table by which `view` makes the tuple of arrays."""
    for tensor in tensors:
        assert tensor.is_contiguous()
        yield tensor.data_ptr()
        yield from tensor.shape


def _work(body: Any) -> Any:
    def work(at, first, last):
        body(view(at), first, last)
        return 0

    return work


def _share(at):
    """What each thread runs. OpenMP may have started fewer than were asked for."""
    work, tables, many, stride, count, thread_number, thread_count = view(at)
    number, shares = 0, 1
    if thread_number:
        number = call(thread_number, ()) & 0xFFFF  # of the result only an int counts
        shares = call(thread_count, ()) & 0xFFFF
    first, last = count * number // shares, count * (number + 1) // shares
    for table in range(many):
        call(work, (tables + 8 * stride * table, first, last))
    return 0


@cache
def _compiled_share() -> Any:
    return c_function(_share, (0,) * 7, __name__, _SOURCES)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same bytes in a dtype that numpy has."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16)
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


@cache
def _openmp() -> tuple[Any, int, int]:
    """OpenMP's calls in torch's copy of it: to run in parallel, a thread's number, their count.

    The last two by address. (None, 0, 0) where torch has none that gives them: then one thread
    computes all.
    """
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        run = library.GOMP_parallel
        asked = library.omp_get_thread_num, library.omp_get_num_threads
    except (OSError, AttributeError):
        return None, 0, 0
    run.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
    run.restype = None
    number, count = (ctypes.cast(function, ctypes.c_void_p).value or 0 for function in asked)
    return run, number, count
