"""A real limit on a process's memory, page cache included: a cgroup of version 2 or 1."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

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


@dataclass(frozen=True)
class Cap:
    """A cgroup that a child enters by running `enter` before it starts its program."""

    folder: Path
    _peak: str
    _current: str

    def enter(self) -> None:
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def peak_bytes(self) -> int:
        """The most that was charged at once: anonymous memory and page cache."""
        return int((self.folder / self._peak).read_text())

    def current_bytes(self) -> int:
        return int((self.folder / self._current).read_text())


@contextmanager
def memory_cap(limit_bytes: int | None) -> Iterator[Cap | None]:
    """A fresh cgroup with this limit (None: only measured), swap off; removed afterwards.

    Gives None where no cgroup can be made, so that the run can say it was not capped.
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
    try:
        yield cap
    finally:
        if cap:
            for _ in range(50):  # a killed child leaves its cgroup a moment later
                with suppress(OSError):
                    cap.folder.rmdir()
                    break
                time.sleep(0.1)
