"""Measures the drive: fio, and the engine's own reader on the same file in the same run."""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import xxhash

from flashmoe.disk.direct_io import aligned_memory, drop_page_cache
from flashmoe.engines.transformers.checkpoints.backends.packed import PackedModel
from flashmoe.errors import FlashMoEError
from flashmoe.reading.base import READERS
from flashmoe.reading.reader import GROUPED_BELOW_BYTES, ExtentReader
from flashmoe.store.manifest import Manifest, lay_out
from harness.progress import Say

BLOCK_BYTES = (4 << 10, 128 << 10, 1 << 20, 4 << 20, 16 << 20)
DEPTHS = (1, 4, 16)
EXTENT_BYTES = {"demo model": 48 << 10, "olmoe-1b-7b": 12 << 20}
ENGINES = ("io_uring", "libaio", "psync")
_FILE_BYTES = 768 << 20  # a multiple of both extents
_RATIO_ROUNDS = 6
# fio's buffers lie on huge pages, as the engine's do: without them fio is slower, and the roofline
# would lie below what the drive can do.
_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
READS_PER_THREAD = 16  # of small extents, as in a prefill that misses most of a layer


def fio_path() -> str | None:
    return shutil.which("fio")


@contextmanager
def test_file(folder: Path, size_bytes: int = _FILE_BYTES) -> Iterator[Path]:
    """A file of random bytes on `folder`'s file system, out of the page cache, removed after."""
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < 2 * size_bytes:
        raise FlashMoEError(f"{folder}: {2 * size_bytes >> 20} MiB of free disk are needed")
    with tempfile.TemporaryDirectory(prefix="flashmoe-ssd-", dir=folder) as temporary:
        path = Path(temporary) / "blocks.bin"
        with open(path, "wb") as file:
            for _ in range(size_bytes >> 20):
                file.write(os.urandom(1 << 20))
            file.flush()
            os.fsync(file.fileno())
            drop_page_cache(file.fileno())
        yield path


def fio(
    path: Path, block_bytes: int, depth: int, pattern: str, engine: str, seconds: float
) -> dict[str, Any]:
    """One fio job, direct reads; bytes a second and latency percentiles.

    Raises FlashMoEError with fio's own words when it fails.
    """
    command = [
        "fio", "--name=read", f"--filename={path}", f"--bs={block_bytes}", "--direct=1",
        f"--rw={'randread' if pattern == 'random' else 'read'}", f"--ioengine={engine}",
        f"--iodepth={depth}", f"--runtime={round(seconds * 1000)}ms", "--time_based",
        "--randseed=1", "--readonly", "--output-format=json",
        "--thread",  # a process of fio's own outlived a run that was stopped
    ]  # fmt: skip
    if engine == "psync":
        command += [f"--numjobs={depth}", "--group_reporting"]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | _HUGE_PAGES)
    if run.returncode:
        message = (run.stderr or run.stdout).strip().splitlines() or ["nothing"]
        raise FlashMoEError(f"fio failed ({engine}): {message[-1]}")
    read = json.loads(run.stdout[run.stdout.index("{") :])["jobs"][0]["read"]
    percentiles = read["clat_ns"].get("percentile", {})
    return {
        "by": f"fio {engine}",
        "pattern": pattern,
        "block_bytes": block_bytes,
        "depth": depth,
        "bytes_per_second": read["bw_bytes"],
        "latency_p50_ms": percentiles.get("50.000000", 0) / 1e6,
        "latency_p99_ms": percentiles.get("99.000000", 0) / 1e6,
    }


@cache  # asked before every measured run, and the answer is the machine's
def working_engine(path: Path) -> str:
    """The first of io_uring, libaio and psync that this kernel and fio run."""
    for engine in ENGINES:
        try:
            fio(path, 4096, 1, "random", engine, 0.2)
            return engine
        except FlashMoEError:
            continue
    raise FlashMoEError(f"fio runs none of {', '.join(ENGINES)} here")


def read_speed(path: Path, block_bytes: int, seconds: float, pattern: str = "random") -> float:
    """fio's bytes a second for reads of an existing file, at the best of two depths.

    Of the store's own file: a small test file may come from the host's cache.
    """
    engine = working_engine(path)
    rows = [fio(path, block_bytes, depth, pattern, engine, seconds) for depth in (1, 4)]
    return max(float(row["bytes_per_second"]) for row in rows)


class ReaderBench:
    """The engine's ExtentReader over the test file, as if it were a store of such extents."""

    def __init__(self, path: Path, extent_bytes: int, depth: int) -> None:
        shape = [("w", "float32", (extent_bytes // 4,))]
        layer = lay_out("bench", path.stat().st_size // extent_bytes, 0, shape)
        with open(path, "rb") as file:
            sums = tuple(
                xxhash.xxh3_64_hexdigest(file.read(extent_bytes)) for _ in range(layer.n_experts)
            )
            drop_page_cache(file.fileno())
        manifest = Manifest("bench", "", 1, path.name, "", 0, (replace(layer, checksums=sums),))
        # depth counts extents; a large one is read by the engine's own number of threads
        small = extent_bytes < GROUPED_BELOW_BYTES
        self.reader = ExtentReader(
            PackedModel(path.parent, manifest), readers=depth if small else READERS
        )
        self.n_extents = layer.n_experts
        self.extent_bytes = extent_bytes
        self.depth = depth
        self.batch = depth * READS_PER_THREAD if small else 1
        # small: one batch in flight while the other is collected
        slots = 2 * self.batch if small else depth
        self.memory = aligned_memory(slots * extent_bytes)
        self.slots = [
            memoryview(self.memory)[i * extent_bytes : (i + 1) * extent_bytes] for i in range(slots)
        ]
        self.random = random.Random(1)

    def bytes_per_second(self, seconds: float) -> float:
        """Random extents, `depth` in flight, for at least `seconds`."""
        in_flight: deque[tuple[Future[None], memoryview]] = deque()
        started, done = time.perf_counter(), 0

        def start(slots: list[memoryview]) -> None:
            extents = self.random.sample(range(self.n_extents), len(slots))
            reads = self.reader.submit(0, list(zip(extents, slots, strict=True)))
            in_flight.extend(zip(reads, slots, strict=True))

        for first in range(0, len(self.slots), self.batch):
            start(self.slots[first : first + self.batch])
        while in_flight:
            collected = [in_flight.popleft() for _ in range(self.batch)]
            for future, _ in collected:
                future.result()
            done += self.extent_bytes * self.batch
            if time.perf_counter() - started < seconds:
                start([slot for _, slot in collected])
        return done / (time.perf_counter() - started)

    def close(self) -> None:
        self.reader.close()
        for slot in self.slots:
            slot.release()
        self.memory.close()


def measure(folder: Path, say: Say, *, seconds: float = 1.0) -> dict[str, list[dict[str, Any]]]:
    """Tables `ssd` (fio's grid) and `reader` (reader against fio, interleaved)."""
    if fio_path() is None:
        say("fio is missing: install it (for example `sudo apt install fio`) for its rows")
    with test_file(folder) as path:
        rows = list(_grid(path, seconds, say)) if fio_path() else []
        comparisons = [
            _compare(path, name, extent, depth, seconds, say)
            for name, extent in EXTENT_BYTES.items()
            for depth in (1, 4)
        ]
    return {"ssd": rows, "reader": comparisons}


def _grid(path: Path, seconds: float, say: Say) -> Iterator[dict[str, Any]]:
    engine = working_engine(path)
    for block_bytes in sorted({*BLOCK_BYTES, *EXTENT_BYTES.values()}):
        for pattern in ("sequential", "random"):
            for depth in DEPTHS:
                row = fio(path, block_bytes, depth, pattern, engine, seconds)
                say(
                    f"fio {pattern:10} {block_bytes >> 10:6} KiB depth {depth:2}: "
                    f"{row['bytes_per_second'] / 1e9:.2f} GB/s"
                )
                yield row


def _compare(
    path: Path, name: str, extent_bytes: int, depth: int, seconds: float, say: Say
) -> dict[str, Any]:
    """Reader and fio in turn; the ratio of each pair, since the drive's speed drifts."""
    engine = working_engine(path) if fio_path() else None
    bench = ReaderBench(path, extent_bytes, depth)
    try:
        bench.bytes_per_second(seconds)  # the first reads are checked, later ones are not
        ours, theirs = [], []
        for round_number in range(_RATIO_ROUNDS):

            def run_fio() -> None:
                if engine:
                    row = fio(path, extent_bytes, depth, "random", engine, seconds)
                    theirs.append(row["bytes_per_second"])

            if round_number % 2:  # who goes first alternates
                run_fio()
            ours.append(bench.bytes_per_second(seconds))
            if not round_number % 2:
                run_fio()
    finally:
        bench.close()
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=False))
    row = {
        "extents_of": name,
        "extent_bytes": extent_bytes,
        "depth": depth,
        "reader_bytes_per_second": statistics.median(ours),
        "fio_bytes_per_second": statistics.median(theirs) if theirs else None,
        "reader_over_fio": statistics.median(ratios) if ratios else None,
        "ratio_min": ratios[0] if ratios else None,
        "ratio_max": ratios[-1] if ratios else None,
        "rounds": len(ours),
    }
    ratio = f", {statistics.median(ratios):.0%} of fio" if ratios else ""
    say(
        f"engine's reader, {extent_bytes >> 10} KiB extents, depth {depth}: "
        f"{statistics.median(ours) / 1e9:.2f} GB/s{ratio}"
    )
    return row
