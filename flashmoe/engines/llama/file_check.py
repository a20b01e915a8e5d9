"""Reads a GGUF file once, with all its parts, and checks what can be checked without a model."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from flashmoe.disk.direct_io import aligned_memory, drop_page_cache, open_direct, read_all
from flashmoe.engines.llama.expert_tensors import expert_tensors, parts_of
from flashmoe.engines.llama.ggml import GGML
from flashmoe.engines.llama.gguf_head import GGUFHead, TensorPlace, read_head
from flashmoe.engines.llama.model_file import outer_pages
from flashmoe.engines.llama.same_file import copies_of
from flashmoe.errors import FlashMoEError

_READERS, _STEP_BYTES = 4, 8 << 20


class _Piece(NamedTuple):
    """Whole blocks of a tensor, or bytes between tensors (place: None)."""

    place: TensorPlace | None
    start: int
    end: int


def check(
    ggml: GGML, path: Path, progress: Callable[[int, int], object], also: Sequence[Path] = ()
) -> str:
    """Read all of `path` past the page cache, and let the library look at each tensor's numbers.

    Checks that the library reads the head, that all tensors lie in the file and share no byte, and
    that experts divide. GGUF has no checksums: a flipped bit that leaves a number is not seen. Of
    a split file `path` is the first part, and all are checked. progress: called with bytes done
    and bytes in all. also: copies (see `same_file`), of which every byte must be the same.
    Raises FlashMoEError for the first damage, and as `parts_of`.
    """
    paths = parts_of(ggml, path)
    heads = [_head(ggml, part, number, len(paths)) for number, part in enumerate(paths)]
    sizes = [part.stat().st_size for part in paths]
    experts = sum(len(expert_tensors(*one)) for one in zip(paths, heads, strict=True))
    for one in zip(paths, heads, sizes, strict=True):
        _check_places(*one)
    before = 0
    for part, head, size in zip(paths, heads, sizes, strict=True):
        copies = copies_of(ggml, part, head, also)
        for done in _check_numbers(ggml, part, head, size, copies):
            progress(before + done, sum(sizes))
        before += size
    tensors = sum(len(head.tensors) for head in heads)
    where = f"its {len(paths)} files" if len(paths) > 1 else "the file"
    same = f"; every byte is the same in {len(also) + 1} copies" if also else ""
    return (
        f"all {tensors} tensors, {experts} of them experts', lie in {where} and hold numbers{same}"
    )


def _head(ggml: GGML, path: Path, number: int, count: int) -> GGUFHead:
    """Of a model's file with this number. Raises FlashMoEError where it is another."""
    head = read_head(ggml, path)
    if head is None:
        raise FlashMoEError(f"{path} is no GGUF file that llama.cpp can read: fetch it again")
    if count > 1 and (head.part, head.parts) != (number, count):
        raise FlashMoEError(
            f"{path} holds part {head.part + 1} of {head.parts}, not what its name says: fetch it "
            "again"
        )
    return head


def _check_numbers(
    ggml: GGML, path: Path, head: GGUFHead, size: int, copies: Sequence[Path]
) -> Iterator[int]:
    """Check every byte of a file, and of its copies; bytes done so far, piece by piece."""
    files = [(place, *open_direct(place, os.O_RDONLY)) for place in (path, *copies)]
    local = threading.local()

    def read(number: int, piece: _Piece) -> memoryview:
        """The pages of a piece, in a thread's own memory: of the file, or of a copy."""
        place, descriptor, direct = files[number]
        if not hasattr(local, "memory"):
            step = _STEP_BYTES + 2 * os.sysconf("SC_PAGE_SIZE")
            local.memory = [aligned_memory(step) for _ in range(min(2, len(files)))]
        first, last = outer_pages(piece.start, piece.end - piece.start)
        view = memoryview(local.memory[number > 0])[: last - first]
        try:
            read_all(descriptor, view, piece.end - first, first)
        except EOFError:
            raise FlashMoEError(f"{place} became shorter while it was read") from None
        except OSError as error:
            raise FlashMoEError(
                f"{place}: bytes {piece.start} to {piece.end} cannot be read ({error})"
            ) from None
        if not direct:
            drop_page_cache(descriptor, first, last - first)
        return view[piece.start - first : piece.end - first]

    def check_piece(piece: _Piece) -> int:
        content = read(0, piece)
        for number in range(1, len(files)):
            if read(number, piece) != content:
                raise FlashMoEError(
                    f"{files[number][0]} is not the same file as {path} (they differ between byte "
                    f"{piece.start} and {piece.end}): see which is right, and copy it again"
                )
        if piece.place:
            begin, count = ctypes.addressof(ctypes.c_char.from_buffer(content)), len(content)
            if not ggml.library.ggml_validate_row_data(piece.place.kind, begin, count):
                raise FlashMoEError(
                    f"{path}: {piece.place.name} holds what are no numbers: fetch the file again"
                )
        return piece.end - piece.start

    done, threads = 0, ThreadPoolExecutor(_READERS)
    try:
        for count in threads.map(check_piece, _pieces(ggml, head, size)):
            done += count
            yield done
    finally:
        threads.shutdown(cancel_futures=True)
        for _, descriptor, _ in files:
            drop_page_cache(descriptor)  # the head was read through it
            os.close(descriptor)


def _check_places(path: Path, head: GGUFHead, size: int) -> None:
    end = 0
    for place in sorted(head.tensors, key=lambda place: place.offset_bytes):
        if place.offset_bytes < end:
            raise FlashMoEError(f"{path}: {place.name} lies over another tensor: fetch it again")
        end = place.offset_bytes + place.size_bytes
        if end > size:
            raise FlashMoEError(
                f"{path} was cut short: {place.name} should end at byte {end}, the file at {size}: "
                "fetch it again"
            )


def _pieces(ggml: GGML, head: GGUFHead, size: int) -> Iterator[_Piece]:
    """The whole file, in order."""
    end = 0
    for place in sorted(head.tensors, key=lambda place: place.offset_bytes):
        yield from _steps(None, end, place.offset_bytes, 1)
        end = place.offset_bytes + place.size_bytes
        yield from _steps(
            place, place.offset_bytes, end, int(ggml.library.ggml_type_size(place.kind))
        )
    yield from _steps(None, end, size, 1)


def _steps(place: TensorPlace | None, start: int, end: int, block_bytes: int) -> Iterator[_Piece]:
    step = _STEP_BYTES // block_bytes * block_bytes
    for first in range(start, end, step):
        yield _Piece(place, first, min(first + step, end))
