"""Reads and writes files past the page cache where it can, in the aligned memory this needs."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import mmap
import os
import resource
from pathlib import Path

from flashmoe.errors import FlashMoEError

logger = logging.getLogger(__name__)

MOST_STALLS = 16  # reads in a row that bring nothing new before a drive counts as failed
ALIGNMENT_BYTES = 4096  # covers 512-byte and 4 KiB logical blocks, and the page size
_PUNCH_HOLE = 0x03  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
_libc = ctypes.CDLL(None, use_errno=True)
_O_DIRECT = getattr(os, "O_DIRECT", 0)
_NOT_DIRECT = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS}  # O_DIRECT is refused
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # the disk, a quota or a file is full


def aligned_memory(size_bytes: int) -> mmap.mmap:
    """Page-aligned anonymous memory, zero-filled, resident only where touched.

    It asks for huge pages, so that the kernel pins few of them for a direct read.
    """
    memory = mmap.mmap(-1, max(size_bytes, mmap.PAGESIZE), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a kernel built without transparent huge pages
            logger.debug("no huge pages here")
    return memory


def open_file(path: Path, flags: int, mode: int = 0o644) -> int:
    """`os.open`; where the process reaches its limit on open files, this raises the limit.

    Raises OSError, and FlashMoEError where the limit cannot be raised.
    """
    try:
        return os.open(path, flags | os.O_CLOEXEC, mode)
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        if soft != hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return os.open(path, flags | os.O_CLOEXEC, mode)
    except (OSError, ValueError):
        raise FlashMoEError(
            f"{path} cannot be opened: too many files are open (this process may have {hard}): "
            "raise the limit with `ulimit -n`"
        ) from None


def open_direct(path: Path, flags: int, mode: int = 0o644) -> tuple[int, bool]:
    """A descriptor for `path`, and whether it bypasses the page cache.

    Falls back to buffered I/O, with a warning, where the file system refuses O_DIRECT
    (tmpfs, some network and overlay file systems) at opening or at the first read.
    Raises as `open_file`, and OSError where that read fails.
    """
    if _O_DIRECT:
        descriptor = -1
        try:
            descriptor = open_file(path, flags | _O_DIRECT, mode)
            if flags & os.O_ACCMODE == os.O_RDONLY:
                os.preadv(descriptor, [aligned_memory(ALIGNMENT_BYTES)], 0)
            return descriptor, True
        except OSError as error:
            if descriptor >= 0:
                os.close(descriptor)
            if error.errno not in _NOT_DIRECT:
                error.filename = str(path)  # which that of a read lacks
                raise
        if flags & os.O_EXCL:  # some file systems make the new file and then refuse
            path.unlink(missing_ok=True)
    logger.warning(
        "%s: this file system refuses direct I/O; it is read and written through the page cache, "
        "from which the pages are dropped after use",
        path,
    )
    descriptor = open_file(path, flags, mode)
    if hasattr(os, "posix_fadvise"):  # nobody would drop the pages of a readahead
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    return descriptor, False


def _direct_flag(descriptor: int) -> int:
    """O_DIRECT, or 0."""
    return fcntl.fcntl(descriptor, fcntl.F_GETFL) & _O_DIRECT


def read_all(descriptor: int, memory: memoryview, needed: int, offset: int) -> None:
    """Read into aligned `memory` from `offset` on, at least the first `needed` bytes.

    A short read may end anywhere, but a direct read must begin where a block begins.
    Raises EOFError when the file ends too early, OSError when the drive fails or stalls.
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


def reserve(descriptor: int, size_bytes: int) -> None:
    """Reserve room on the disk for so many bytes, where the file system can.

    Raises OSError where there is not enough room. It does nothing without O_DIRECT, because the C
    library may then write a byte into every block, so that the disk writes everything twice.
    """
    if not _direct_flag(descriptor):
        return
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise
        logger.debug("no room can be reserved here: %s", error)


def give_back(descriptor: int, offset_bytes: int, size_bytes: int) -> None:
    """Free the disk space of a part of a file that is open for writing; zeros are read there.

    Raises OSError where the file system cannot.
    """
    offset, size = ctypes.c_int64(offset_bytes), ctypes.c_int64(size_bytes)
    if _libc.fallocate(descriptor, _PUNCH_HOLE, offset, size):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def write_all(descriptor: int, memory: memoryview, offset: int) -> None:
    """Write all of aligned `memory` at `offset`, past the page cache where the file system can.

    Raises OSError when the drive fails or is full.
    """
    done = 0
    while done < len(memory):
        try:
            done += os.pwrite(descriptor, memory[done:], offset + done)
        except OSError as error:
            if error.errno not in _NOT_DIRECT or not _direct_flag(descriptor):
                raise
            # Some file systems refuse O_DIRECT only at the first write.
            flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~_O_DIRECT)


def drop_page_cache(descriptor: int, offset: int = 0, size_bytes: int = 0) -> None:
    """Ask the kernel to forget the file's clean pages (all of them by default)."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, size_bytes, os.POSIX_FADV_DONTNEED)
