"""The heads of a model's files on the hub: sparse files of the same sizes, without the weights.

Whatever reads a head on this disk reads these.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from flashmoe.disk.files import is_inside
from flashmoe.engines import hub
from flashmoe.errors import FlashMoEError

FIRST_BYTES = {".safetensors": 128 << 10, ".gguf": 1 << 20}  # that are asked for of a file
_MOST_HEAD_BYTES = 256 << 20
_WHOLE = ("config.json", ".index.json")  # ends of names of files that are fetched whole
_AT_ONCE = 8  # files
# Bytes of a GGUF setting by its type; of a text, and of an array's elements, so many follow.
_FIXED = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT, _ARRAY = 8, 9


@contextmanager
def heads_of(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Where the heads of a model lie: `path` itself, unless it is a name on the hub.

    Raises FlashMoEError as `hub.on_disk` does where it cannot be had.
    """
    if not hub.is_name(path):
        yield Path(path)
        return
    with TemporaryDirectory(prefix="flashmoe-heads-") as folder, ThreadPoolExecutor(_AT_ONCE) as do:
        with hub.told(os.fspath(path)):
            found = hub.listed(path)
            needed = [n for n in found.names if n.endswith((*FIRST_BYTES, *_WHOLE))]
            home = found.folder or Path(folder)
            if found.folder is None:
                fetch = partial(_fetch, found.repository, home)
                list(do.map(fetch, needed))
        yield home / found.file if found.file else home


def _fetch(repository: str, home: Path, name: str) -> None:
    """Write the head of one file, and the rest of it as a hole."""
    if not is_inside(name, subfolders=True):
        raise FlashMoEError(f"it has a file outside its folder ({name!r})")
    path = home / name
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = path.suffix
    wanted = FIRST_BYTES.get(suffix, _MOST_HEAD_BYTES)
    data, size_bytes = _first_bytes(repository, name, wanted)
    while suffix in FIRST_BYTES and len(data) < size_bytes:
        wanted = _HEAD_BYTES[suffix](data)
        if wanted <= len(data):
            break
        if wanted > _MOST_HEAD_BYTES:
            raise FlashMoEError(f"{name} has no head that makes sense")
        data, _ = _first_bytes(repository, name, wanted)
    with open(path, "wb") as file:
        file.write(data)
        file.truncate(size_bytes)


def _first_bytes(repository: str, name: str, count: int) -> tuple[bytes, int]:
    """At most `count` bytes of a file's beginning, and how many it has in all."""
    from huggingface_hub import get_session, hf_hub_url, utils

    headers = utils.build_hf_headers()  # type: ignore[attr-defined]
    headers |= {"Range": f"bytes=0-{count - 1}"}
    # as a stream: a server that knows no ranges would send all of it
    with get_session().stream("GET", hf_hub_url(repository, name), headers=headers) as answer:
        utils.hf_raise_for_status(answer)  # type: ignore[attr-defined]
        data = b""
        for piece in answer.iter_bytes():
            data += piece
            if len(data) >= count:
                break
        _, _, whole = answer.headers.get("Content-Range", "").partition("/")
        size = whole or answer.headers.get("Content-Length", str(len(data)))
        return data[:count], int(size)


def _safetensors_head_bytes(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def _gguf_head_bytes(data: bytes) -> int:
    """The length of a GGUF file's head; twice what is there where it does not end within that."""
    try:
        return _end_of_gguf_head(data)
    except (struct.error, KeyError):
        return 2 * len(data)


def _end_of_gguf_head(data: bytes) -> int:
    """Raises struct.error where `data` ends before, KeyError for a type that GGUF has not."""

    def number(at: int, format: str = "<Q") -> int:
        return int(struct.unpack_from(format, data, at)[0])

    def after_text(at: int) -> int:
        return at + 8 + number(at)

    def after_value(at: int, kind: int) -> int:
        if kind == _TEXT:
            return after_text(at)
        if kind != _ARRAY:
            return at + _FIXED[kind]
        kind, count, at = number(at, "<I"), number(at + 4), at + 12
        if kind in _FIXED:
            return at + count * _FIXED[kind]
        for _ in range(count):
            at = after_value(at, kind)
        return at

    tensors, settings, at = number(8), number(16), 24
    for _ in range(settings):
        at = after_text(at)
        at = after_value(at + 4, number(at, "<I"))
    for _ in range(tensors):
        at = after_text(at)
        at += 4 + 8 * number(at, "<I") + 12  # dimensions, type and offset
    return at


_HEAD_BYTES: dict[str, Callable[[bytes], int]] = {
    ".safetensors": _safetensors_head_bytes,
    ".gguf": _gguf_head_bytes,
}
