"""How many cores this process may compute on."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from flashmoe.util import cgroups

_PROCESSORS = Path("/sys/devices/system/cpu")


def available(
    processors: Path = _PROCESSORS,
    root: Path = cgroups.ROOT,
    membership: Path = cgroups.MEMBERSHIP,
) -> int:
    """Physical cores that this process may use, within its cgroups' quota; at least 1."""
    allowed = os.sched_getaffinity(0)
    cores = {_core(processors / f"cpu{number}" / "topology", number) for number in allowed}
    quotas = [_quota(*one) for one in cgroups.folders("cpu", root, membership)]
    return max(1, min(len(cores), *map(int, quotas)) if quotas else len(cores))


def _core(topology: Path, number: int) -> tuple[str, ...]:
    """What the hardware threads of one core have in common; its own number where nobody says."""
    with suppress(OSError):
        names = ("physical_package_id", "core_id")
        return tuple((topology / name).read_text().strip() for name in names)
    return (f"processor {number}",)


def _quota(version: int, folder: Path) -> float:
    """Processors' time that a cgroup may take, in processors; very many where it has no limit."""
    with suppress(OSError, ValueError):
        if version == 2:
            limit, period = (folder / "cpu.max").read_text().split()
        else:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            limit, period = ((folder / name).read_text() for name in names)
        if int(limit) > 0:  # "max" is no number, and the older version says -1
            return int(limit) / int(period)
    return 1 << 20
