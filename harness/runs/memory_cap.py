"""Real limits on a process: memory with the page cache, and reading speed; cgroups v2 or v1."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

from flashmoe.errors import FlashMoEError
from harness.runs.page_cache import drop_all

# (controller's folder, limit, peak, current) of each version
_VERSIONS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.peak", "memory.current"),
    (
        Path("/sys/fs/cgroup/memory"),
        "memory.limit_in_bytes",
        "memory.max_usage_in_bytes",
        "memory.usage_in_bytes",
    ),
)
_SWAP_OFF = (("memory.swap.max", "0"), ("memory.swappiness", "0"))
_BLKIO = Path("/sys/fs/cgroup/blkio")  # version 1's controller of block devices


@dataclass(frozen=True)
class ReadLimit:
    """At most so many bytes a second from the device that holds `path`."""

    path: Path
    bytes_per_second: int

    @property
    def device(self) -> str:
        """major:minor of the whole disk: a limit on a partition is refused."""
        number = self.path.stat().st_dev
        entry = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
        disk = entry.parent if (entry / "partition").exists() else entry
        return (disk / "dev").read_text().strip()


@dataclass(frozen=True)
class Cap:
    """Cgroups that a child enters by running `enter` before it starts its program."""

    folder: Path
    _peak: str
    _current: str
    _others: tuple[Path, ...] = ()

    def enter(self) -> None:
        for folder in (self.folder, *self._others):
            (folder / "cgroup.procs").write_text(str(os.getpid()))

    def peak_bytes(self) -> int:
        """The most that was charged at once: anonymous memory and page cache."""
        return int((self.folder / self._peak).read_text())

    def current_bytes(self) -> int:
        return int((self.folder / self._current).read_text())

    def own_bytes(self) -> int:
        """Of that what is no file's: anonymous memory and what processes share."""
        lines = (self.folder / "memory.stat").read_text().splitlines()
        each = {name: int(value) for name, value in map(str.split, lines)}
        names = ("total_rss", "total_shmem") if "total_rss" in each else ("anon", "shmem")
        return sum(each.get(name, 0) for name in names)

    def process_ids(self) -> set[int]:
        return {int(line) for line in (self.folder / "cgroup.procs").read_text().split()}


@contextmanager
def memory_cap(
    limit_bytes: int | None, read_limits: Sequence[ReadLimit] = ()
) -> Iterator[Cap | None]:
    """A fresh cgroup with this limit (None: only measured), swap off; removed afterwards.

    Gives None where no cgroup can be made, so that the run can say it was not capped.
    Raises FlashMoEError where reading cannot be limited: such a run must not look throttled.
    """
    cap = None
    for root, limit, peak, current in _VERSIONS:
        folder = root / f"flashmoe-{uuid4().hex[:8]}"
        with suppress(OSError):
            if not (root / "cgroup.procs").exists():
                continue
            folder.mkdir()
            if not (folder / peak).exists():
                folder.rmdir()
                continue
            for name, value in ((limit, str(limit_bytes or -1)), *_SWAP_OFF):
                if limit_bytes and (folder / name).exists():
                    (folder / name).write_text(value)
            cap = Cap(folder, peak, current)
            break
    folders = [cap.folder] if cap else []
    try:
        if read_limits:
            folders += _limit_reading(cap, read_limits)
        yield replace(cap, _others=tuple(folders[1:])) if cap else None
    finally:
        for folder in folders:
            _remove(folder)


def require_limits() -> None:
    """Raises FlashMoEError where a run would not be capped, or would find its files in memory."""
    with memory_cap(1 << 30) as cap:
        if cap is None:
            raise FlashMoEError(
                "no limit on memory can be set here, so nothing would be capped: run it as root"
            )
    if not drop_all():
        raise FlashMoEError("the page cache cannot be emptied here: run it as root")


def _limit_reading(cap: Cap | None, limits: Sequence[ReadLimit]) -> list[Path]:
    """Limit the cap's own cgroup (version 2), or one beside it (version 1), which is returned.

    Each device has its own limit.
    """
    try:
        by_device = {limit.device: limit.bytes_per_second for limit in limits}
        if cap is None:
            raise OSError("no cgroup can be made")
        if (cap.folder / "io.max").exists():
            for device, speed in by_device.items():
                (cap.folder / "io.max").write_text(f"{device} rbps={speed}")
            return []
        folder = _BLKIO / f"flashmoe-{uuid4().hex[:8]}"
        folder.mkdir()
        try:
            for device, speed in by_device.items():
                rule = f"{device} {speed}"
                (folder / "blkio.throttle.read_bps_device").write_text(rule)
        except BaseException:
            _remove(folder)
            raise
        return [folder]
    except OSError as error:
        places = " and ".join(str(limit.path) for limit in limits)
        raise FlashMoEError(f"reading from {places} cannot be limited here ({error})") from None


def _remove(folder: Path) -> None:
    # A killed child leaves when its memory is given back, which takes seconds if it thrashed.
    for _ in range(300):
        with suppress(OSError):
            folder.rmdir()
            return
        time.sleep(0.1)
