"""Says whether programs wait for memory, as the kernel counts it (pressure stall information)."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from flashmoe.util import cgroups

# Of the time between two questions, in which at least one program waited.
PRESSED_SHARE = 0.1
_MACHINE = Path("/proc/pressure/memory")


class Pressure:
    """That of this process's cgroup (version 2), else the machine's; none where neither tells."""

    def __init__(
        self,
        machine: Path = _MACHINE,
        root: Path = cgroups.ROOT,
        membership: Path = cgroups.MEMBERSHIP,
    ) -> None:
        folders = cgroups.folders("memory", root, membership)
        files = [folder / "memory.pressure" for version, folder in folders if version == 2]
        self._file = next((file for file in files if file.exists()), machine)
        self._asked_at = time.monotonic()
        self._waited_seconds = self._read()

    def _read(self) -> float:
        """Seconds in which at least one program waited, since the start of the machine."""
        with suppress(OSError, ValueError):
            for line in self._file.read_text().splitlines():
                kind, *entries = line.split()
                values = dict(entry.split("=") for entry in entries)
                if kind == "some" and "total" in values:
                    return int(values["total"]) / 1e6
        return 0.0

    def is_high(self) -> bool:
        """Since the last question."""
        now, waited = time.monotonic(), self._read()
        share = (waited - self._waited_seconds) / max(now - self._asked_at, 1e-3)
        self._asked_at, self._waited_seconds = now, waited
        return share > PRESSED_SHARE
