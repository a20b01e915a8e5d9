"""Classes of storage by what their interfaces carry, for runs on a drive that is slowed to it."""

from __future__ import annotations

from typing import NamedTuple

from flashmoe.errors import FlashMoEError
from flashmoe.util.sizes import format_bytes
from harness.progress import Say


class StorageClass(NamedTuple):
    """What a class carries at most; its drives stay somewhat below."""

    bytes_per_second: int
    source: str


CLASSES = {
    "emmc": StorageClass(
        400_000_000, "eMMC 5.1 (JEDEC JESD84-B51), HS400: 8 lines x 200 MHz x 2 edges"
    ),
    "sata": StorageClass(
        600_000_000, "Serial ATA revision 3.0: 6 Gbit/s, of 10 bits 8 are the user's"
    ),
    "ufs": StorageClass(
        2_332_000_000, "UFS 3.1 (JEDEC JESD220E): 2 lanes x 11.66 Gbit/s, 8 bits of 10"
    ),
    "pcie3": StorageClass(3_938_000_000, "PCI Express 3.0 x4: 8 GT/s a lane, 128 bits of 130"),
    "pcie4": StorageClass(7_877_000_000, "PCI Express 4.0 x4: 16 GT/s a lane, 128 bits of 130"),
    "pcie5": StorageClass(15_754_000_000, "PCI Express 5.0 x4: 32 GT/s a lane, 128 bits of 130"),
}


def check_known(names: list[str]) -> None:
    """Raises FlashMoEError for a name that is no class's; call it before gigabytes are written."""
    for name in names:
        if name not in CLASSES:
            raise FlashMoEError(f"storage {name!r} is not known: choose from {', '.join(CLASSES)}")


def within(names: list[str], drive_bytes_per_second: float, say: Say) -> dict[str, int]:
    """Bytes a second of those classes that a drive can stand for; the others are told of.

    Raises FlashMoEError where no class is left.
    """
    found = {}
    for name in names:
        speed = CLASSES[name].bytes_per_second
        if speed > drive_bytes_per_second:
            say(
                f"{name} is left out: it carries {format_bytes(speed)} a second, and fio reads "
                f"{format_bytes(int(drive_bytes_per_second))} from this drive"
            )
        else:
            found[name] = speed
    if not found:
        raise FlashMoEError(
            f"this drive is slower than {' and '.join(names)}: name a slower class by --storage"
        )
    return found
