"""What this machine has: free memory, cores, and how fast memory and drive are, measured."""

from __future__ import annotations

import mmap
import os
import random
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flashmoe.disk.direct_io import (
    ALIGNMENT_BYTES,
    aligned_memory,
    drop_page_cache,
    open_direct,
    read_all,
)
from flashmoe.disk.files import check_room
from flashmoe.errors import reading
from flashmoe.memory import free_memory
from flashmoe.reading.base import PIECE_BYTES, READERS
from flashmoe.util import cores
from flashmoe.util.sizes import format_bytes

DRIVE_SECONDS, MEMORY_SECONDS = 1.5, 0.4
_TEST_FILE_BYTES = 256 << 20
_NEW_BYTES = 256 << 20
_CPUINFO = Path("/proc/cpuinfo")
_SWEEP_BYTES = 64 << 20  # of memory a core, at a time: more than its caches hold


@dataclass(frozen=True)
class Machine:
    """What a plan needs to know; speeds in bytes a second."""

    available_bytes: int  # of memory, for this process, by the machine and its cgroups
    cores: int
    avx512: bool
    memory_bytes_per_second: float
    new_memory_bytes_per_second: float  # that is written for the first time
    drive_bytes_per_second: float
    drive_measured_on: str


def measure(path: Path | None, piece_bytes: int, folder: Path) -> Machine:
    """path: a file of the drive that will be read, None: a temporary one in `folder` is written.

    piece_bytes: of one expert. Raises FlashMoEError where a file cannot be read or written.
    """
    if path:
        on = path.name
        drive = drive_speed(path, piece_bytes)
    else:
        on = f"a temporary file of {format_bytes(_TEST_FILE_BYTES)} in {folder}"
        with _test_file(folder) as temporary:
            drive = drive_speed(temporary, piece_bytes)
    count = cores.available()
    return Machine(
        available_bytes=free_memory.available_bytes(),
        cores=count,
        avx512=has_avx512(),
        memory_bytes_per_second=memory_speed(count),
        new_memory_bytes_per_second=new_memory_speed(),
        drive_bytes_per_second=drive,
        drive_measured_on=on,
    )


def drive_speed(path: Path, piece_bytes: int, seconds: float = DRIVE_SECONDS) -> float:
    """Bytes a second of random reads past the page cache, as many at once as the engines have.

    It ends early when as much was read as the file has. Raises FlashMoEError where it fails.
    """
    piece = min(piece_bytes, PIECE_BYTES, path.stat().st_size)
    piece = max(piece // ALIGNMENT_BYTES * ALIGNMENT_BYTES, ALIGNMENT_BYTES)
    count = max(path.stat().st_size // piece, 1)
    with reading(path):
        descriptor, _ = open_direct(path, os.O_RDONLY)
        ends = time.perf_counter() + seconds

        def read(numbers: list[int]) -> int:
            memory, done = memoryview(aligned_memory(piece)), 0
            for number in numbers:
                if time.perf_counter() > ends:
                    break
                needed = min(piece, path.stat().st_size - number * piece)
                read_all(descriptor, memory, needed, number * piece)
                done += needed
            return done

        order = list(range(count))
        random.Random(0).shuffle(order)
        try:
            drop_page_cache(descriptor)
            started = time.perf_counter()
            with ThreadPoolExecutor(READERS) as threads:
                done = sum(threads.map(read, (order[i::READERS] for i in range(READERS))))
            return done / (time.perf_counter() - started)
        finally:
            os.close(descriptor)


def memory_speed(count: int, seconds: float = MEMORY_SECONDS) -> float:
    """Bytes a second that all cores together read of memory."""
    words = [np.ones(_SWEEP_BYTES // 8, np.int64) for _ in range(count)]
    ends = time.perf_counter() + seconds

    def sweep(mine: np.ndarray) -> int:
        done = 0
        while time.perf_counter() < ends:
            np.bitwise_xor.reduce(mine)
            done += mine.nbytes
        return done

    started = time.perf_counter()
    with ThreadPoolExecutor(count) as threads:
        done = sum(threads.map(sweep, words))
    return done / (time.perf_counter() - started)


def new_memory_speed() -> float:
    """Bytes a second of memory that is asked for and first written to, in the system's pages.

    The system must find and clear each page, and so must the host of a virtual machine: on some
    that takes longer than a drive takes to read as much.
    """
    with mmap.mmap(-1, _NEW_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        pages = np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE]
        started = time.perf_counter()
        pages[:] = 1
        seconds = time.perf_counter() - started
        del pages  # which keeps the memory
    return _NEW_BYTES / seconds


def has_avx512(cpuinfo: Path = _CPUINFO) -> bool:
    """Has this processor vectors of 512 bits? No, where nobody says."""
    try:
        return " avx512f " in f"{cpuinfo.read_text()} ".replace("\n", " ")
    except OSError:
        return False


@contextmanager
def _test_file(folder: Path) -> Iterator[Path]:
    """A file of random bytes on the drive, removed afterwards."""
    folder = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    check_room(folder, "a file to measure the drive with", _TEST_FILE_BYTES)
    with reading(folder), tempfile.NamedTemporaryFile(dir=folder, prefix=".flashmoe-") as file:
        for _ in range(_TEST_FILE_BYTES >> 20):
            file.write(os.urandom(1 << 20))
        file.flush()
        os.fsync(file.fileno())
        yield Path(file.name)
