"""What a machine and its drive are, without anything of whose they are."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import psutil
import torch

from harness.report import provenance

# What the fastest bus of a class carries: PCIe 6 with four lanes, USB4, eMMC 5.1 (and UFS under its
# name), 400 Gb/s; a drive of unknown class may be several on all lanes of a slot.
BUS_BYTES_PER_SECOND = {
    "nvme": 32e9,
    "sata": 600e6,
    "usb": 10e9,
    "emmc": 6e9,
    "network": 50e9,
    "unknown": 64e9,
}
_MEMORY_STEP_BYTES = 256 << 20  # to which memory is rounded: kernels keep different parts
# A flag of the kernel's for each set: x86 and then Arm.
_SETS = {
    "amx": "amx_tile",
    "avx2": "avx2",
    "avx512": "avx512f",
    "avx512_bf16": "avx512_bf16",
    "neon": "asimd",
    "sve": "sve",
}
_NETWORK_FILE_SYSTEMS = ("nfs", "cifs", "smb", "ceph", "glusterfs", "lustre", "9p", "fuse.sshfs")
# Of a block device's path below /sys/devices, in this order: a disk on USB is a SCSI disk too.
_CLASSES = (
    ("nvme", r"/nvme"),
    ("emmc", r"/mmc"),
    ("usb", r"/usb\d"),
    ("sata", r"/ata\d"),
    ("network", r"/(nbd|rbd)\d"),
)
_BLOCK_DEVICES = Path("/sys/dev/block")


def machine() -> dict[str, Any]:
    """The part `machine` of a datapoint."""
    flags = provenance.flags()
    steps = max(1, round(psutil.virtual_memory().total / _MEMORY_STEP_BYTES))
    there = torch.cuda.is_available()
    return {
        "cpu": _product(provenance.cpu_name()),
        "cores": psutil.cpu_count(),
        "memory_bytes": steps * _MEMORY_STEP_BYTES,
        "instruction_sets": [name for name, flag in _SETS.items() if flag in flags],
        "virtual": "hypervisor" in flags if "fpu" in flags else None,  # x86 has both
        "accelerator": _product(torch.cuda.get_device_name()) if there else None,
    }


def _product(name: str) -> str:
    """A product's name in the letters that the schema allows."""
    return re.sub(r"[^A-Za-z0-9 ()@.,/+_-]", "", name)[:80].strip()


def drive_class(folder: Path, bytes_per_second: float) -> tuple[str, str | None]:
    """What kind of drive holds `folder`, and who says so: the kernel, its speed, or nobody.

    bytes_per_second: of its reads, the fastest.
    """
    kind, said_by = _told_class(folder, bytes_per_second)
    # an array of them, or a virtual bus that is none
    return (kind, said_by) if bytes_per_second <= BUS_BYTES_PER_SECOND[kind] else ("unknown", None)


def _told_class(folder: Path, bytes_per_second: float) -> tuple[str, str | None]:
    file_system, device = provenance.mount_of(folder)
    if file_system.startswith(_NETWORK_FILE_SYSTEMS):
        return "network", "kernel"
    try:
        number = Path(device).stat().st_rdev
    except OSError:
        return "unknown", None
    path = (_BLOCK_DEVICES / f"{os.major(number)}:{os.minor(number)}").resolve()
    kinds = {_kind(disk) for disk in _disks(path)}
    if len(kinds) == 1 and (kind := kinds.pop()):
        return kind, "kernel"
    if "/virtio" in str(path) and bytes_per_second > BUS_BYTES_PER_SECOND["sata"]:
        return "nvme", "speed"
    return "unknown", None


def _disks(path: Path) -> list[Path]:
    """The devices below one that is made of others, as encryption and volumes are."""
    below = sorted((path / "slaves").glob("*"))
    return [disk for one in below for disk in _disks(one.resolve())] or [path]


def _kind(path: Path) -> str | None:
    return next((kind for kind, part in _CLASSES if re.search(part, str(path))), None)
