"""Block devices of their own, made of files, with a file system on each."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from flashmoe.errors import FlashMoEError

_SECTOR_BYTES = 512  # of the kernel's counts


@dataclass(frozen=True)
class LoopDrive:
    """A device that the kernel counts and limits as it does any drive."""

    folder: Path  # where its file system is mounted
    device: str  # loop0
    image: Path  # the file it is made of

    def read_bytes(self) -> int:
        """That were read from it since it was made."""
        return int(Path(f"/sys/block/{self.device}/stat").read_text().split()[2]) * _SECTOR_BYTES

    def lose(self) -> None:
        """From now on it fails, as a drive does whose blocks are gone: every read ends in EIO."""
        os.truncate(self.image, 0)


@contextmanager
def loop_drives(work: Path, count: int, size_bytes: int) -> Iterator[list[LoopDrive]]:
    """Devices of so many bytes, whose files lie in `work`; gone afterwards.

    Raises FlashMoEError where this user or this kernel makes none.
    """
    with ExitStack() as until_end:
        yield [until_end.enter_context(_drive(work, str(n), size_bytes)) for n in range(count)]


@contextmanager
def _drive(work: Path, name: str, size_bytes: int) -> Iterator[LoopDrive]:
    image, folder = work / f"{name}.img", work / f"drive-{name}"
    folder.mkdir()
    with open(image, "wb") as file:
        file.truncate(size_bytes)
    device = ""
    try:
        # past the page cache of the file beneath, which would make the device faster than a drive
        device = _run("losetup", "--find", "--show", "--direct-io=on", str(image))
        _run("mkfs.ext4", "-q", "-E", "nodiscard", "-m", "0", device)
        _run("mount", "-o", "noatime", device, str(folder))
        try:
            yield LoopDrive(folder, Path(device).name, image)
        finally:
            with suppress(FlashMoEError):
                _run("umount", "--lazy", str(folder))
    finally:
        if device:
            with suppress(FlashMoEError):
                _run("losetup", "--detach", device)
        image.unlink(missing_ok=True)


def _run(*command: str) -> str:
    if shutil.which(command[0]) is None:
        raise FlashMoEError(f"{command[0]} is missing: install util-linux and e2fsprogs")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise FlashMoEError(f"no loop device can be made here ({command[0]}: {words[-1]})")
    return done.stdout.strip()
