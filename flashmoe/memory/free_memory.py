"""How much memory this process may still take: a device's, the machine's, or its cgroup's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from flashmoe.errors import FlashMoEError
from flashmoe.util import cgroups
from flashmoe.util.sizes import format_bytes

# memory="auto" leaves the larger of the two, in bytes and as a share of what is free, to a prompt's
# activations, the allocator and the libraries (docs/speed.md#memory-beside-the-budget).
RESERVE_BYTES, RESERVE_SHARE = 768 << 20, 0.1

# By cgroup version: the files of limit and usage, and the name in memory.stat of the page cache
# that the kernel would give up. Above memory.high it slows programs down.
_FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
_SOFT_LIMIT = "memory.high"
_NO_LIMIT = 1 << 60  # version 1 says so by a number of this size


def available_bytes() -> int:
    """Bytes of DRAM that can be taken without swapping, and without meeting a cgroup's limit.

    Raises FlashMoEError where the system does not say.
    """
    return max(0, min([_machine(), *_cgroups()]))


def reserve_of(all_bytes: int, reserve_bytes: int = RESERVE_BYTES) -> int:
    """What stays free of `all_bytes`, the experts' own among them."""
    return max(reserve_bytes, int(all_bytes * RESERVE_SHARE))


def budget_bytes(
    dense_bytes: int,
    device: str,
    least_bytes: int = 1,
    present_bytes: int = 0,
    reserve_bytes: int = RESERVE_BYTES,
) -> int:
    """The bytes of `device` ("cpu", "cuda:0") that `memory="auto"` gives the experts.

    dense_bytes: what the rest of the model is still to take there. least_bytes: what experts need
    at least. present_bytes: what experts take there now, which they may use again. reserve_bytes:
    see `reserve_of`.
    Raises FlashMoEError when less than `least_bytes` is left, or the system does not say how much
    memory is free.
    """
    available = available_bytes() if device == "cpu" else _free_on(device)
    reserve = reserve_of(available + present_bytes, reserve_bytes)
    budget = available + present_bytes - reserve - dense_bytes
    if budget < least_bytes:
        besides = ""
        if present_bytes:
            besides = f" besides the {format_bytes(present_bytes)} of its experts"
        raise FlashMoEError(
            f"memory='auto': too little memory is free on {device}: {format_bytes(available)}"
            f"{besides}, {format_bytes(reserve)} of which stay reserved for all but weights, and "
            f"the model needs {format_bytes(dense_bytes + least_bytes)} at least: free "
            f"{format_bytes(least_bytes - budget)} more, or give memory= a size to use the reserve"
        )
    return budget


def _free_on(device: str) -> int:
    """Bytes that an accelerator has free. Raises FlashMoEError where torch does not say."""
    import torch  # only where there is an accelerator

    try:
        available, _ = torch.get_device_module(device).mem_get_info(device)
    except (AttributeError, RuntimeError) as error:
        raise FlashMoEError(
            f"memory='auto': torch does not say how much memory {device} has free ({error}): "
            "give memory= a size, such as 4GiB"
        ) from None
    return int(available)


def _machine(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes that the machine has free. Raises FlashMoEError where the system does not say."""
    with suppress(OSError, ValueError):
        for line in meminfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    # unused pages without the page cache: fewer bytes than there are, so a safe answer
    with suppress(OSError, ValueError):
        if (pages := os.sysconf("SC_AVPHYS_PAGES")) > 0:
            return pages * os.sysconf("SC_PAGE_SIZE")
    raise FlashMoEError(
        "memory='auto': this system does not say how much memory is free (/proc/meminfo has no "
        "MemAvailable): give memory= a size, such as 4GiB"
    )


def _cgroups(root: Path = cgroups.ROOT, membership: Path = cgroups.MEMBERSHIP) -> Iterator[int]:
    """The bytes that each cgroup with a limit has left: this process's and those above it."""
    for version, folder in cgroups.folders("memory", root, membership):
        with suppress(OSError, ValueError):
            yield _left_bytes(folder, *_FILES[version])


def _left_bytes(folder: Path, limit: str, usage: str, reclaimable: str) -> int:
    """A cgroup's limit less its usage. Raises OSError or ValueError without a limit ("max")."""
    limits = []
    for name in (limit, _SOFT_LIMIT):
        with suppress(OSError, ValueError):
            limits.append(int((folder / name).read_text()))
    if (limit_bytes := min(limits)) >= _NO_LIMIT:
        raise ValueError(limit_bytes)
    used, inactive = int((folder / usage).read_text()), 0
    with suppress(OSError, ValueError):  # without statistics, none counts as reclaimable
        statistics = dict(
            line.split() for line in (folder / "memory.stat").read_text().splitlines()
        )
        inactive = int(statistics.get(reclaimable, 0))
    return limit_bytes - used + inactive
