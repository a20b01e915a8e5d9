"""How much memory this process may still take: a device's, the machine's, or its cgroup's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

# Left to everything but weights: a prompt's activations, the allocator, the libraries' pages
# (768 MiB hold them at OLMoE's size: docs/speed.md); a tenth where there is plenty, for others.
RESERVE_BYTES, RESERVE_SHARE = 768 << 20, 0.1

_CGROUPS = Path("/sys/fs/cgroup")
_FILES = {  # of each version: limit, usage, the statistic of what the kernel would give up
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def available_bytes() -> int:
    """Bytes that can be taken without swapping, and without meeting a cgroup's limit."""
    return min([_machine(), *_cgroups()])


def budget_bytes(dense_bytes: int, device: torch.device) -> int:
    """What `memory="auto"` gives the experts, once `dense_bytes` are on the device too."""
    if device.type == "cpu":
        available = available_bytes()
    else:
        available, _ = torch.get_device_module(device).mem_get_info(device)
    return available - max(RESERVE_BYTES, int(available * RESERVE_SHARE)) - dense_bytes


def _machine() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable")


def _cgroups(root: Path = _CGROUPS, own: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """What each cgroup that holds this process has left, its own and those above."""
    with suppress(OSError):
        for line in own.read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0":
                version, base = 2, root
            elif "memory" in controllers.split(","):
                version, base = 1, root / "memory"
            else:
                continue
            # in a container the path may be the host's, so that only the root is there
            for folder in [base / path.lstrip("/"), *(base / path.lstrip("/")).parents]:
                with suppress(OSError, ValueError):
                    yield _left(folder, *_FILES[version])
                if folder == base:
                    break


def _left(folder: Path, limit: str, usage: str, reclaimable: str) -> int:
    """Raises OSError or ValueError where there is no limit ("max")."""
    statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    used = int((folder / usage).read_text()) - int(statistics.get(reclaimable, 0))
    return int((folder / limit).read_text()) - used
