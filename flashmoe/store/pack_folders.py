"""The folders that a pack writes into: fit for it, locked, and without leftovers afterwards."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from flashmoe.disk import files
from flashmoe.errors import FlashMoEError, reading
from flashmoe.store import manifest as manifests
from flashmoe.store.layout import config_digest
from flashmoe.util.sizes import format_bytes

_DATA_FILES = "experts-*.bin", "dense-*.safetensors", "folders-*.json"


def check_distinct(folders: Sequence[Path]) -> None:
    """Raises FlashMoEError where two are one, or they are more than a store can have."""
    places = [folder.resolve() for folder in folders]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise FlashMoEError(f"{folders[number]} is named twice: name a folder of another drive")
    if len(folders) > manifests.MOST_SHARES:
        raise FlashMoEError(f"a store lies in at most {manifests.MOST_SHARES} folders")


def exists(store: Path, checkpoint: Path) -> bool:
    """Is `store` a directory already? Raises FlashMoEError where it must not be packed into."""
    with reading(store):
        if not store.exists():
            return False
        if not store.is_dir():
            raise FlashMoEError(f"{store} is a file: name a directory for the store")
        if store.samefile(checkpoint):
            raise FlashMoEError(f"{store} is the checkpoint itself: name another directory")
        config = store / "config.json"
        is_store = manifests.is_store(store)
        taken = is_store or (config.is_file() and not config.is_symlink())
        if taken and config_digest(store) != config_digest(checkpoint):
            kind = "store" if is_store else "folder"
            raise FlashMoEError(
                f"{store} is a {kind} of another model than {checkpoint}: name another directory, "
                f"or remove that {kind} first"
            )
    return True


def check_room(folder: Path, needed_bytes: int) -> None:
    """Raises FlashMoEError where the disk of `folder` has not so much free."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise FlashMoEError(
            f"{folder}: the store needs {format_bytes(needed_bytes)} and the disk has "
            f"{format_bytes(free_bytes)} free"
        )


@contextmanager
def locked(store: Path) -> Iterator[None]:
    """Holds the lock of a directory, which ends with the process.

    Raises FlashMoEError where another pack holds it.
    """
    # a link is not followed, because whoever made this directory may not be trusted
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(store / ".lock", flags, 0o644), "r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FlashMoEError(f"{store}: another pack into it is under way") from None
        yield


@contextmanager
def without_leftovers(folder: Path, store: Path) -> Iterator[None]:
    """Afterwards, data files are removed that neither manifest names, `folder`'s and `store`'s."""
    try:
        yield
    finally:
        with suppress(ValueError):  # what a damaged manifest names is not known
            stems = {Path(name).stem for place in (folder, store) for name in _named(place)}
            leftovers = [path for name in _DATA_FILES for path in folder.glob(name)]
            for path in leftovers + [p for p in folder.rglob(".*.partial") if files.is_partial(p)]:
                # a share has a number more
                if not {path.stem, path.stem.rpartition("-")[0]} & stems:
                    path.unlink(missing_ok=True)


def _named(store: Path) -> list[str]:
    if not manifests.is_store(store):
        return []
    document = json.loads((store / manifests.FILE_NAME).read_text())
    kinds = "experts_file", "dense_file", "folders_file"
    return [document[kind] for kind in kinds if document.get(kind)]
