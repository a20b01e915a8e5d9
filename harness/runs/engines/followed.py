"""All processes that a command starts, wherever they go."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path

import psutil

from harness.runs.process_usage import drive_bytes

_PR_SET_CHILD_SUBREAPER = 36
_KILL_ROUNDS = 60


class Followed:
    """Within, orphans of what this process starts become its own children, and are killed after.

    Start nothing else meanwhile: it would count as the command's.
    """

    def __enter__(self) -> Followed:
        self._before = {process.pid for process in _descendants()}
        self._read_bytes = 0
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        return self

    def __exit__(self, *error: object) -> None:
        for _ in range(_KILL_ROUNDS):  # some start others while they are being killed
            started = self.started()
            for process in started:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(started, timeout=1)
            if not started:
                break
        for process in psutil.Process().children():
            if process.pid not in self._before:
                with suppress(ChildProcessError):
                    os.waitpid(process.pid, os.WNOHANG)
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)

    def started(self) -> list[psutil.Process]:
        """Those that run now."""
        return [process for process in self._all() if _runs(process)]

    def read_bytes(self) -> int:
        """What drives have delivered to them, page faults included, and to those that have ended.

        It never falls. Of a process for whose end nobody waits, the kernel may forget it.
        """
        total = 0
        for process in self._all():
            with suppress(OSError, StopIteration):
                total += drive_bytes(process.pid)
        self._read_bytes = max(self._read_bytes, total)
        return self._read_bytes

    def memory_bytes(self) -> int:
        """What they hold beside files; what several share counts once."""
        return sum(map(_own_bytes, self.started()))

    def _all(self) -> list[psutil.Process]:
        return [process for process in _descendants() if process.pid not in self._before]


def _descendants() -> list[psutil.Process]:
    children: list[psutil.Process] = psutil.Process().children(recursive=True)
    return children


def _own_bytes(process: psutil.Process) -> int:
    with suppress(OSError):
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        kinds = ("Pss_Anon:", "Pss_Shmem:")
        return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(kinds))
    return 0


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
