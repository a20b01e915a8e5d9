"""How much memory this process may still take: a device's, the machine's, or its cgroup's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from flashmoe.errors import FlashMoEError
from flashmoe.util.sizes import format_bytes

# Left to everything but weights: a prompt's activations, the allocator, the libraries' pages
# (768 MiB hold them at OLMoE's size: docs/speed.md); a tenth where there is plenty, for others.
RESERVE_BYTES, RESERVE_SHARE = 768 << 20, 0.1

_CGROUPS = Path("/sys/fs/cgroup")
_FILES = {  # of each version: limit, usage, the statistic of what the kernel would give up
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def available_bytes() -> int:
    """Bytes that can be taken without swapping, and without meeting a cgroup's limit.

    Raises FlashMoEError where the system does not say.
    """
    return max(0, min([_machine(), *_cgroups()]))


def budget_bytes(
    dense_bytes: int, device: torch.device, least_bytes: int = 1, held_bytes: int = 0
) -> int:
    """What `memory="auto"` gives the experts, once `dense_bytes` are on the device too.

    held_bytes: what experts have there now, which is theirs again. Raises FlashMoEError when
    that is less than the `least_bytes` that they need, or the system does not say what is free.
    """
    available = available_bytes() if device.type == "cpu" else _device(device)
    reserve = max(RESERVE_BYTES, int(available * RESERVE_SHARE))
    budget = available + held_bytes - reserve - dense_bytes
    if budget < least_bytes:
        held = f" besides the {format_bytes(held_bytes)} of its experts" if held_bytes else ""
        raise FlashMoEError(
            f"memory='auto': too little memory is free on {device}: {format_bytes(available)}"
            f"{held}, {format_bytes(reserve)} of which stay reserved for all but weights, and the "
            f"model needs {format_bytes(dense_bytes + least_bytes)} at least: free "
            f"{format_bytes(least_bytes - budget)} more, or give memory= a size to use the reserve"
        )
    return budget


def _device(device: torch.device) -> int:
    try:
        available, _ = torch.get_device_module(device).mem_get_info(device)
    except (AttributeError, RuntimeError) as error:
        raise FlashMoEError(
            f"memory='auto': torch does not say how much memory {device} has free ({error}): "
            "give memory= a size, such as 4GiB"
        ) from None
    return int(available)


def _machine(meminfo: Path = Path("/proc/meminfo")) -> int:
    with suppress(OSError, ValueError):
        for line in meminfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    with suppress(OSError, ValueError):  # what nobody uses, caches not counted: less, but safe
        if (pages := os.sysconf("SC_AVPHYS_PAGES")) > 0:
            return pages * os.sysconf("SC_PAGE_SIZE")
    raise FlashMoEError(
        "memory='auto': this system does not say how much memory is free (/proc/meminfo has no "
        "MemAvailable): give memory= a size, such as 4GiB"
    )


def _cgroups(root: Path = _CGROUPS, own: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """What each cgroup that holds this process has left, its own and those above."""
    with suppress(OSError, ValueError):
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
    used, inactive = int((folder / usage).read_text()), 0
    with suppress(OSError, ValueError):  # else the kernel gives up nothing that we know of
        statistics = dict(
            line.split() for line in (folder / "memory.stat").read_text().splitlines()
        )
        inactive = int(statistics.get(reclaimable, 0))
    return int((folder / limit).read_text()) - used + inactive
