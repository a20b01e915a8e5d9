"""The cgroups that this process belongs to, of either version."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

ROOT, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def folders(
    controller: str, root: Path = ROOT, membership: Path = MEMBERSHIP
) -> Iterator[tuple[int, Path]]:
    """(version, folder) of each cgroup that may limit this process, its own and those above it.

    controller: as version 1 calls it, such as "memory" or "cpu".
    """
    with suppress(OSError, ValueError):
        for line in membership.read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0":
                version, base = 2, root
            elif controller in controllers.split(","):
                version, base = 1, root / controller
            else:
                continue
            # in a container the path may be the host's, and then only the root exists
            for folder in [base / path.lstrip("/"), *(base / path.lstrip("/")).parents]:
                yield version, folder
                if folder == base:
                    break
