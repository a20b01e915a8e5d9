"""Finds the copies of a GGUF file on other drives, and tells whether they are what it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from flashmoe.engines.llama.expert_tensors import GGUFContents
from flashmoe.engines.llama.ggml import GGML
from flashmoe.engines.llama.gguf_head import GGUFHead, read_head
from flashmoe.errors import FlashMoEError

_STEP_BYTES = 1 << 20
_SAMPLE_BYTES = 4096  # of each tensor


def copies_of(
    ggml: GGML, path: Path, file: GGUFContents | GGUFHead, also: Sequence[Path]
) -> list[Path]:
    """The copies of `path`, each the same in size, head, and some bytes of every tensor.

    also: a file or its folder for each copy; of a split file the later parts lie beside the first.
    What differs elsewhere is not seen: `flashmoe verify --also` reads all.
    Raises FlashMoEError for a copy that is not there, or another file.
    """
    head = read_head(ggml, path) if also else None
    copies: list[Path] = []
    for place in also:
        if place.is_dir():
            copy = place / path.name
        else:
            copy = place.with_name(path.name) if file.part else place
        if head:
            _check_same(path, copy, list(_samples(head, path.stat().st_size)))
            copies.append(copy)
    return copies


def _samples(head: GGUFHead, size_bytes: int) -> Iterator[tuple[int, int]]:
    """Offsets and bytes: all before the first tensor, then a little of each, anywhere in it."""
    first = min((tensor.offset_bytes for tensor in head.tensors), default=size_bytes)
    for offset in range(0, first, _STEP_BYTES):
        yield offset, min(_STEP_BYTES, first - offset)
    for number, tensor in enumerate(head.tensors):
        room = max(1, tensor.size_bytes - _SAMPLE_BYTES)
        inside = number * 2654435761 % room  # by a multiplier of Knuth's: evenly spread
        yield tensor.offset_bytes + inside, min(_SAMPLE_BYTES, tensor.size_bytes - inside)


def _check_same(path: Path, copy: Path, ranges: Sequence[tuple[int, int]]) -> None:
    try:
        if copy.samefile(path):
            raise FlashMoEError(f"{copy} is {path} itself: name a copy on another drive")
        difference = ""
        sizes = path.stat().st_size, copy.stat().st_size
        if sizes[0] != sizes[1]:
            difference = f"it has {sizes[1]} bytes, not {sizes[0]}"
        else:
            with open(path, "rb", 0) as one, open(copy, "rb", 0) as other:
                for offset, size_bytes in ranges:
                    one.seek(offset)
                    other.seek(offset)
                    if one.read(size_bytes) != other.read(size_bytes):
                        difference = f"they differ after byte {offset}"
                        break
    except OSError as error:
        raise FlashMoEError(
            f"{error.filename or copy} cannot be read ({error.strerror or error}): see that its "
            "drive is mounted, or leave it out"
        ) from None
    if difference:
        raise FlashMoEError(
            f"{copy} is not the same file as {path} ({difference}): copy it again, or leave it out"
        )
