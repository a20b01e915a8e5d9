"""What processes have used: bytes from block devices, processor time, energy."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_RAPL = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Used:
    """Between two moments. Joules are of the whole machine's packages; None: not told here."""

    device_bytes: int  # that the kernel fetched from storage for this process, faults included
    cpu_seconds: float  # of all its threads, in user and kernel mode
    joules: float | None


class Usage:
    """Counters of the process since `take`, or since it was made."""

    def __init__(self) -> None:
        self.take()

    def take(self) -> None:
        self._before = _counters()

    def since(self) -> Used:
        device, cpu, microjoules = (
            None if now is None or then is None else now - then
            for now, then in zip(_counters(), self._before, strict=True)
        )
        return Used(
            int(device or 0), float(cpu or 0), None if microjoules is None else microjoules / 1e6
        )


def drive_bytes(pid: int) -> int:
    """What a process has had read from drives, page faults included; Linux counts it."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def _counters() -> tuple[float, float, float | None]:
    times = os.times()
    microjoules = None
    with suppress(OSError, ValueError):  # absent in most virtual machines, for root only elsewhere
        packages = [p for p in _RAPL.glob("intel-rapl:*") if p.name.count(":") == 1]
        if packages:
            microjoules = float(sum(int((p / "energy_uj").read_text()) for p in packages))
    return float(drive_bytes(os.getpid())), times.user + times.system, microjoules
