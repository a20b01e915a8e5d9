"""Byte sizes as people write them ("4GiB", "512 MB", 1048576) and back."""

from __future__ import annotations

import re

from flashmoe.errors import FlashMoEError

_UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("", 1024), ("B", 1000), ("IB", 1024))
}


def parse_bytes(size: int | str) -> int:
    """Bytes of `size`; "4GiB" and "4G" are 4 * 2**30, "4GB" is 4 * 10**9.

    Raises FlashMoEError for anything else, and for zero or less.
    """
    number, unit = str(size), ""
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*([A-Za-z]*)\s*", size)
        if match is None or match[2].upper() not in _UNITS:
            raise FlashMoEError(f"memory size {size!r} is not a size: write for example 4GiB")
        number, unit = match[1], match[2].upper()
    size_bytes = int(float(number) * _UNITS[unit])
    if size_bytes <= 0:
        raise FlashMoEError(f"memory size {size!r} must be more than zero bytes")
    return size_bytes


def format_bytes(size_bytes: float) -> str:
    """A short human form in binary units: 13421772 -> '12.8 MiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size_bytes) < 1024 or unit == "GiB":
            break
        size_bytes /= 1024
    return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
