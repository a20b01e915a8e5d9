"""O_DIRECT files and the aligned memory that they need."""

from __future__ import annotations

import errno
import logging
import mmap
import os
from pathlib import Path

logger = logging.getLogger(__name__)

MOST_STALLS = 16
ALIGNMENT_BYTES = 4096  # covers 512-byte and 4 KiB logical blocks, and the page size


def aligned_memory(size_bytes: int) -> mmap.mmap:
    """Page-aligned anonymous memory, zero-filled, resident only where touched.

    Huge pages are asked for: pinning a 12 MiB extent for a direct read then takes 6 pages
    in place of 3,072.
    """
    memory = mmap.mmap(-1, max(size_bytes, mmap.PAGESIZE), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a kernel built without transparent huge pages
            logger.debug("no huge pages here")
    return memory


def open_direct(path: Path, flags: int, mode: int = 0o644) -> tuple[int, bool]:
    """A descriptor for `path`, and whether it bypasses the page cache.

    Falls back to buffered I/O, with a warning, where the file system refuses O_DIRECT
    (tmpfs, some network and overlay file systems) at opening or at the first read.
    """
    direct = getattr(os, "O_DIRECT", 0)
    if direct:
        try:
            descriptor = os.open(path, flags | direct | os.O_CLOEXEC, mode)
            if flags & os.O_ACCMODE != os.O_RDONLY:
                return descriptor, True
            try:
                os.preadv(descriptor, [aligned_memory(ALIGNMENT_BYTES)], 0)
                return descriptor, True
            except OSError:
                os.close(descriptor)
        except OSError as error:
            if isinstance(error, (FileNotFoundError, PermissionError)):
                raise
    logger.warning(
        "%s: this file system refuses direct I/O; reading through the page cache, "
        "from which the pages are dropped after use",
        path,
    )
    descriptor = os.open(path, flags | os.O_CLOEXEC, mode)
    if hasattr(os, "posix_fadvise"):  # readahead would bring in pages that nobody drops
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    return descriptor, False


def read_all(descriptor: int, memory: memoryview, needed: int, offset: int) -> None:
    """Fill aligned `memory` from `offset` on, the first `needed` bytes at least.

    A short read may end anywhere, but a direct one can only go on from a block's beginning.
    Raises EOFError when the file ends before, OSError when the drive fails or stops giving.
    """
    done = stalled = 0
    while done < needed:
        block = done // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        count = os.preadv(descriptor, [memory[block:]], offset + block)
        if count == 0:
            raise EOFError
        stalled = 0 if block + count > done else stalled + 1
        if stalled == MOST_STALLS:
            raise OSError(errno.EIO, "reads end within the same block again and again")
        done = max(done, block + count)


def drop_page_cache(descriptor: int, offset: int = 0, size_bytes: int = 0) -> None:
    """Ask the kernel to forget the file's clean pages (all of them by default)."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, size_bytes, os.POSIX_FADV_DONTNEED)
