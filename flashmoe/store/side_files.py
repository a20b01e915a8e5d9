"""Copies the files beside a checkpoint's weights into a store: tokenizer, templates and others."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from flashmoe.disk import files
from flashmoe.errors import FlashMoEError
from flashmoe.store import manifest
from flashmoe.util.sizes import format_bytes

LARGEST_BYTES = 128 << 20  # above it a file is no tokenizer
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack",
            ".onnx", ".onnx_data", ".pb", ".tflite", ".ot", ".pkl", ".pickle", ".joblib", ".nemo",
            ".mlmodel", ".engine"}  # fmt: skip
_CODE = {".py", ".pyc", ".pyi", ".so", ".dll", ".dylib", ".exe", ".sh", ".bat", ".ipynb", ".c",
         ".cc", ".cpp", ".cu", ".h", ".js", ".jar"}  # fmt: skip
_MEDIA = {".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".bmp", ".ico", ".pdf", ".html",
          ".mp3", ".mp4", ".mov", ".avi", ".webm", ".wav", ".flac", ".ogg"}  # fmt: skip
_ARCHIVES = {".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".tar", ".7z"}
_DATA_SETS = {".parquet", ".arrow", ".tfevents"}
_OTHERS = _CODE | _MEDIA | _ARCHIVES | _DATA_SETS
_OF_THE_STORE = {Path(manifest.FILE_NAME)}  # other rules leave out its data files and its lock

log = logging.getLogger(__name__)


def copy(source: Path, store: Path) -> None:
    """Copy what transformers reads beside the weights of `source`, sub-directories included.

    It copies everything except weights, code, media, archives, data sets, hidden files, files
    above LARGEST_BYTES (which a warning names) and sub-directories with weights of their own.
    Links to files are followed in the source, since the hub's cache consists of them; the store
    gets no links. Files that an earlier pack left in the store stay.
    Raises FlashMoEError or OSError for a file that cannot be read or written.
    """
    for name in _names(source):
        try:
            content = (source / name).read_bytes()
        except OSError as error:
            raise FlashMoEError(
                f"{source / name} cannot be read ({error.strerror or error})"
            ) from None
        _make_folders(store, name.parent)
        files.replace(store / name, partial(_write, content))


def _write(content: bytes, file: BinaryIO) -> None:
    file.write(content)


def _names(source: Path) -> Iterator[Path]:
    """Names of the files to copy, relative to `source`."""
    for folder, subfolders, names in os.walk(source, onerror=_raise):
        relative = Path(folder).relative_to(source)
        if relative.parts and any(map(_is_of_weights, names)):
            subfolders.clear()
            continue
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            if relative / name not in _OF_THE_STORE and _is_wanted(Path(folder, name)):
                yield relative / name


def _is_wanted(path: Path) -> bool:
    if path.name.startswith(".") or path.suffix.lower() in _OTHERS or _is_of_weights(path.name):
        return False
    if not path.is_file():
        if path.is_symlink():
            log.warning("%s is left behind: it is a link to no file", path)
        return False
    if (size := path.stat().st_size) > LARGEST_BYTES:
        log.warning("%s is left behind: it has %s", path, format_bytes(size))
        return False
    return True


def _is_of_weights(name: str) -> bool:
    return Path(name).suffix.lower() in _WEIGHTS or name.endswith(".index.json")


def _make_folders(store: Path, folder: Path) -> None:
    """Make `folder` in the store, where no part of it may be a link."""
    for part in [*reversed(folder.parents), folder]:
        if (store / part).is_symlink():
            (store / part).unlink()
        (store / part).mkdir(exist_ok=True)


def _raise(error: OSError) -> None:
    raise error
