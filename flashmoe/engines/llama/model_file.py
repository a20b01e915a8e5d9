"""Memory of our own in place of a model file's pages, which the program believes to be mapped."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flashmoe.disk.direct_io import drop_page_cache, open_direct
from flashmoe.engines.llama.expert_tensors import ExpertTensor
from flashmoe.errors import FlashMoEError, reading
from flashmoe.reading.copies import Copies
from flashmoe.util.sizes import format_bytes

PAGE_BYTES = mmap.PAGESIZE
_READERS, _STEP_BYTES = 8, 8 << 20
_MAP_NORESERVE, _MADV_HUGEPAGE, _MADV_NOHUGEPAGE = 0x4000, 14, 15
_HUGE_BYTES = 2 << 20

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_FAILED = ctypes.c_void_p(-1).value


class ModelFile:
    """Address space as long as a model's file: its dense part read in, its experts' pages empty.

    The file itself is never mapped, and nothing of it stays in the page cache.
    """

    def __init__(
        self, path: Path, tensors: tuple[ExpertTensor, ...], copies: Sequence[Path] = ()
    ) -> None:
        """copies: files on other drives that were found to be the same.

        Raises FlashMoEError where the address space cannot be had, or the file not be read.
        """
        self.path = path
        self.tensors = tensors
        self.places = [path, *copies]
        self.descriptors: list[int] = []  # of each place
        self.base = self.size_bytes = 0
        try:
            with reading(path):
                self._fill()
        except EOFError:
            self.free()
            raise FlashMoEError(f"{path} was cut short: fetch it again") from None
        except BaseException:
            self.free()
            raise

    def _fill(self) -> None:
        """Open the file wherever it lies, and read its dense part."""
        direct = []
        for place in self.places:
            descriptor, is_direct = open_direct(place, os.O_RDONLY)
            self.descriptors.append(descriptor)
            direct.append(is_direct)
        self.direct = all(direct)
        self._copies = Copies(self.places)
        self._states = [_state(descriptor) for descriptor in self.descriptors]
        self.size_bytes = self._states[0][0]
        if any(t.offset_bytes + t.size_bytes > self.size_bytes for t in self.tensors):
            raise EOFError
        self.base = self._reserve()
        with ThreadPoolExecutor(_READERS) as threads:
            list(threads.map(lambda part: self.read(*part), self._dense_parts()))
        for descriptor in self.descriptors:
            drop_page_cache(descriptor)  # the file's head was read through it

    def _reserve(self) -> int:
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        base: int = _libc.mmap(None, self.size_bytes, protection, flags, -1, 0)
        if base == _FAILED:
            raise FlashMoEError(
                f"{self.path}: no address space for its {format_bytes(self.size_bytes)} "
                f"({os.strerror(ctypes.get_errno())}): raise the limit (`ulimit -v`), or allow "
                "overcommitting (vm.overcommit_memory 0 or 1)"
            )
        # else one touched page of an expert may bring 2 MiB, which nobody accounts for
        _libc.madvise(base, self.size_bytes, _MADV_NOHUGEPAGE)
        for start, end in self._dense_ranges():  # of these all is touched, at every token
            first = -(-(base + start) // _HUGE_BYTES) * _HUGE_BYTES
            last = (base + end) // _HUGE_BYTES * _HUGE_BYTES
            if last > first:
                _libc.madvise(first, last - first, _MADV_HUGEPAGE)
        return base

    @property
    def dense_bytes(self) -> int:
        """Of everything but experts, and the pages that experts share with their neighbours."""
        return sum(end - start for start, end in self._dense_ranges())

    def _dense_ranges(self) -> Iterator[tuple[int, int]]:
        """What lies outside the whole pages of the experts' tensors, in whole pages."""
        holes = sorted(inner_pages(t.offset_bytes, t.size_bytes) for t in self.tensors)
        start = 0
        for first, last in [*holes, (self.size_bytes, self.size_bytes)]:
            if first > start:
                yield start, first
            start = max(start, last)

    def _dense_parts(self) -> Iterator[tuple[int, int]]:
        for start, end in self._dense_ranges():
            for first in range(start, end, _STEP_BYTES):
                yield first, min(first + _STEP_BYTES, end)

    def read(self, start: int, end: int) -> None:
        """Read the file's bytes from `start` (of a page) to `end` to where they belong.

        Thread-safe. Raises OSError when the drive fails, EOFError when the file became shorter.
        """
        self._copies.read(end - start, partial(self._read_place, start, end))

    def _read_place(self, start: int, end: int, place: int) -> None:
        descriptor = self.descriptors[place]
        length = -(-(end - start) // PAGE_BYTES) * PAGE_BYTES
        view = memoryview((ctypes.c_char * length).from_address(self.base + start)).cast("B")
        end, done = min(end, self.size_bytes), 0
        while start + done < end:
            count = os.preadv(descriptor, [view[done:]], start + done)
            if count == 0:
                raise EOFError
            done += count
        if not self.direct:
            drop_page_cache(descriptor, start, length)

    def job(self, start: np.ndarray, end: np.ndarray) -> list[Any]:
        """What a thread needs to do as `read` does, of several ranges at once.

        All columns of a job but LATE and TICKET (see `range_work`).
        """
        length = -(-(end - start) // PAGE_BYTES) * PAGE_BYTES
        needed = np.minimum(end, self.size_bytes) - start
        return [self.descriptors[0], start, self.base + start, length, needed, not self.direct]

    def drop(self, start: int, end: int) -> None:
        """Give back the memory of these pages; they read as zeros from now on."""
        if end > start and self.base:
            _libc.madvise(self.base + start, end - start, mmap.MADV_DONTNEED)

    def drop_experts(self) -> None:
        """Give back the memory of all experts."""
        for tensor in self.tensors:
            self.drop(*inner_pages(tensor.offset_bytes, tensor.size_bytes))

    def free(self) -> None:
        """Close the file and give back all its memory: nothing uses the model any more."""
        self.close()
        if self.base:
            _libc.munmap(self.base, self.size_bytes)
            self.base = 0

    @property
    def identities(self) -> list[tuple[int, int, int]]:
        """Of each place: descriptor, bytes, and nanoseconds of the last change, when opened."""
        return [
            (descriptor, *state)
            for descriptor, state in zip(self.descriptors, self._states, strict=True)
        ]

    def check_unchanged(self) -> None:
        """Raises OSError when a file is another one than when it was opened."""
        if [_state(descriptor) for descriptor in self.descriptors] != self._states:
            raise OSError("the file changed while it was in use")

    def close(self) -> None:
        """Close the file. Its memory stays: the program goes on using the dense part."""
        while self.descriptors:
            os.close(self.descriptors.pop())


def _state(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns


def outer_pages(offset: Any, size: int) -> tuple[Any, Any]:
    """The pages that hold any of these bytes: from, to."""
    return offset // PAGE_BYTES * PAGE_BYTES, -(-(offset + size) // PAGE_BYTES) * PAGE_BYTES


def inner_pages(offset: Any, size: int) -> tuple[Any, Any]:
    """The pages that hold only these bytes: from, to; none where to <= from."""
    return -(-offset // PAGE_BYTES) * PAGE_BYTES, (offset + size) // PAGE_BYTES * PAGE_BYTES
