"""The folders, on several drives, in which a store's experts lie."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from flashmoe.disk import files
from flashmoe.errors import FlashMoEError
from flashmoe.store.manifest import Manifest
from flashmoe.store.shares import Shares

logger = logging.getLogger(__name__)

_MOST_BYTES = 1 << 20


def write(path: Path, folders: Sequence[Path]) -> None:
    """The side file that names the other folders. Raises FlashMoEError where it cannot be."""
    content = json.dumps({"folders": [str(folder.resolve()) for folder in folders]}, indent=1)
    files.replace(path, lambda file: file.write(content.encode()))


def listed(store: Path, manifest: Manifest) -> list[Path]:
    """The folders that the side file names. Raises FlashMoEError where it is damaged."""
    if not manifest.folders_file:
        return []
    path = store / manifest.folders_file
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError("it is too large")
        names = json.loads(path.read_text())["folders"]
        if not all(isinstance(name, str) and name and "\0" not in name for name in names):
            raise ValueError("folders must be strings")
        return [store / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise FlashMoEError(
            f'{path} cannot be read ({error}): write {{"folders": ["FOLDER", ...]}} into it, with '
            "the other folders of this store"
        ) from None


def files_of(store: Path, manifest: Manifest, also: Sequence[Path] = ()) -> list[list[Path]]:
    """The experts' files: of each copy, one a share; the store's own is the first.

    also: folders in which to look before those that the side file names. A mirror that is not
    there is left out, with a warning, unless it is one of `also`.
    Raises FlashMoEError where a share, or one of `also`, is not there.
    """
    own = store / manifest.experts_file
    if manifest.shares > 1:
        return [[own, *_shares(store, manifest, [*also, *listed(store, manifest)])]]
    found = [own]
    for number, folder in enumerate([*also, *listed(store, manifest)]):
        path = folder / manifest.experts_file
        if obstacle := _obstacle(path, manifest.experts_bytes):
            words = f"{folder} has no copy of the experts of {store} ({obstacle})"
            if number < len(also):
                raise FlashMoEError(f"{words}: copy the store's folder there, or leave it out")
            logger.warning("%s: %s is read alone", words, " and ".join(map(str, found)))
        elif not any(path.samefile(other) for other in found):
            found.append(path)
    return [[path] for path in found]


def _shares(store: Path, manifest: Manifest, folders: Sequence[Path]) -> list[Path]:
    shares, found = Shares(manifest.layers, manifest.shares), []
    for share in range(1, manifest.shares):
        paths = [folder / manifest.share_file(share) for folder in folders]
        obstacles = {path: _obstacle(path, shares.file_bytes(share)) for path in paths}
        right = next((path for path in paths if not obstacles[path]), None)
        if right is None:
            why = "; ".join(f"{path}: {obstacle}" for path, obstacle in obstacles.items())
            raise FlashMoEError(
                f"store {store}: share {share + 1} of {manifest.shares} of its experts is not "
                f"there ({why or 'no folder is named'}): mount its drive, or name its folder by "
                "--also"
            )
        found.append(right)
    return found


def _obstacle(path: Path, size_bytes: int) -> str:
    """Why this is not such a file; "": it is."""
    try:
        if not path.is_file():
            return "no such file"
        size = path.stat().st_size
    except OSError as error:
        return error.strerror or str(error)
    return "" if size == size_bytes else f"it has {size} bytes, not {size_bytes}"
