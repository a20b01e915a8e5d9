"""Arrays in .npz files, which may come from anywhere: no pickles, no absurd sizes."""

from __future__ import annotations

import zipfile
from collections.abc import Collection
from pathlib import Path

import numpy as np

from flashmoe.disk import files
from flashmoe.errors import FlashMoEError

_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class UnreadableError(FlashMoEError):
    """The file is no plain .npz, or damaged."""


def write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write `arrays`, compressed, atomically. Raises FlashMoEError when it cannot."""
    files.replace(
        path,
        lambda file: np.savez_compressed(file, allow_pickle=False, **arrays),  # type: ignore[arg-type]
    )


def read(path: Path, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of `path` by name, or only those that `names` has.

    Arrays take no more memory than the archive's table says, which deflate limits to about a
    thousand times the file's size. Raises UnreadableError, whose text says why.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info.filename.removesuffix(".npy") for info in archive.infolist()]
            if len(set(members)) != len(members):
                raise ValueError("a name occurs twice")
            for info in archive.infolist():
                _check(archive, info)
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in members if names is None or name in names}
    except FileNotFoundError:
        raise UnreadableError("no such file") from None
    except Exception as error:  # numpy and zipfile raise a dozen kinds
        raise UnreadableError(
            f"cannot be read as a plain .npz without pickled objects ({error})"
        ) from None


def _check(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    """Raise ValueError if the array's header claims more than the archive holds, or objects."""
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        if version not in _HEADERS:
            raise ValueError(f"format version {version} of {info.filename}")
        shape, _, dtype = _HEADERS[version](file, max_header_size=10_000)
        if dtype.hasobject:
            raise ValueError(f"{info.filename} holds pickled objects")
        size = dtype.itemsize
        for length in shape:
            size *= length
        if size > info.file_size:
            raise ValueError(f"{info.filename} claims {size} bytes of {info.file_size}")
