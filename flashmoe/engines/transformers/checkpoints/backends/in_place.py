"""A Hugging Face checkpoint as it is: experts are read out of its safetensors shards.

There is no second copy on disk. An expert's tensors lie in several ranges of a file and at odd
offsets, so the enclosing aligned ranges are read past the page cache into a buffer, and copied
from there to where the extent has them. What that costs:
docs/speed.md#reading-a-checkpoint-in-place-costs-a-third-of-the-speed
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from flashmoe.disk.direct_io import (
    ALIGNMENT_BYTES,
    aligned_memory,
    drop_page_cache,
    open_direct,
    read_all,
)
from flashmoe.engines.transformers.checkpoints.backends.base import ModelBackend
from flashmoe.engines.transformers.checkpoints.checkpoint import Checkpoint
from flashmoe.engines.transformers.checkpoints.weight_files import REMEDY
from flashmoe.engines.transformers.model import empty_model
from flashmoe.errors import FlashMoEError
from flashmoe.store import manifest as manifests
from flashmoe.store.layout import config_digest, lay_out_layers
from flashmoe.store.manifest import LayerSpec, Manifest, dtype_name

_LARGEST_COPY_BYTES = 1 << 20  # what one read brings, so that every thread's buffer stays small
# An aligned range that encloses so many bytes, wherever they begin.
_BUFFER_BYTES = _LARGEST_COPY_BYTES + 2 * ALIGNMENT_BYTES


class _Segment(NamedTuple):
    """Bytes of an extent that lie side by side in a file."""

    start_bytes: int  # where they begin in the extent
    size_bytes: int
    file: Path
    offset_bytes: int  # where they begin in the file

    @property
    def end_bytes(self) -> int:
        return self.start_bytes + self.size_bytes

    def is_continued_by(self, other: _Segment) -> bool:
        """Does `other` begin where this one ends, in the extent and in the file?"""
        in_file = (self.file, self.offset_bytes + self.size_bytes)
        return self.end_bytes == other.start_bytes and in_file == (other.file, other.offset_bytes)


class InPlace(ModelBackend):
    """The shards of a checkpoint whose experts' tensors are stored as the model uses them."""

    name = "in-place"
    remedy = REMEDY

    @classmethod
    def accepts(cls, path: Path) -> bool:
        return (path / "config.json").is_file() and not manifests.is_store(path)

    def __init__(self, path: Path, *, also: Sequence[Path] = ()) -> None:
        if also:
            raise FlashMoEError(
                f"{path} is read in place, from one drive: run `flashmoe pack {path} STORE --also "
                f"{also[0]}` and use the store"
            )
        self.path = path
        self._files: dict[Path, tuple[int, bool]] = {}
        self._buffers = threading.local()
        self._checkpoint = Checkpoint(path)
        try:
            description = self._checkpoint.description
            layers = lay_out_layers(description, None)
            for layer in layers:
                self._check_layout(layer)
            self._segments = [
                [self._segments_of(layer, expert) for expert in range(layer.n_experts)]
                for layer in layers
            ]
            for segment in itertools.chain.from_iterable(itertools.chain(*self._segments)):
                if segment.file not in self._files:
                    self._files[segment.file] = open_direct(segment.file, os.O_RDONLY)
        except BaseException:
            self.close()
            raise
        self.direct = all(direct for _, direct in self._files.values())
        self.manifest = Manifest(
            architecture=description.architecture,
            config_sha256=config_digest(path),
            top_k=description.top_k,
            experts_file="",
            dense_file="",
            dense_bytes=self._checkpoint.dense_bytes(),
            layers=tuple(layers),
            quantisation=layers[0].quantisation,
            dtype=dtype_name(self._checkpoint.dtype),
        )

    def _segments_of(self, layer: LayerSpec, expert: int) -> list[_Segment]:
        """Where an extent's bytes lie; those that continue each other are one segment."""
        segments: list[_Segment] = []
        for spec in layer.tensors:
            start = spec.offset_bytes
            for place in self._checkpoint.places(layer.module, spec.name, expert):
                segment = _Segment(start, place.size_bytes, place.file, place.offset_bytes)
                start += place.size_bytes
                if segments and segments[-1].is_continued_by(segment):
                    last = segments.pop()
                    segment = last._replace(size_bytes=last.size_bytes + segment.size_bytes)
                segments.append(segment)
        return segments

    def _check_layout(self, layer: LayerSpec) -> None:
        """Raises FlashMoEError unless the bytes on disk are those that the model computes with."""
        for name, stored_as_used in self._checkpoint.stored_as_used(layer.module).items():
            if not stored_as_used:
                raise self._refusal(f"{layer.module}.{name} is converted when it is loaded")

    def _refusal(self, why: str) -> FlashMoEError:
        return FlashMoEError(
            f"{self.path} cannot be read in place ({why}): run `flashmoe pack {self.path} STORE` "
            "and use the store"
        )

    def build(self) -> PreTrainedModel:
        return empty_model.build(empty_model.read_config(self.path), self._checkpoint.dtype)

    def read(self, layer: int, expert: int, start: int, memory: memoryview) -> None:
        end = start + len(memory)
        for segment in self._segments[layer][expert]:
            first, last = max(segment.start_bytes, start), min(segment.end_bytes, end)
            while first < last:
                size = min(last - first, _LARGEST_COPY_BYTES)
                offset = segment.offset_bytes + first - segment.start_bytes
                self._copy(segment.file, offset, memory[first - start : first - start + size])
                first += size

    def _copy(self, file: Path, offset: int, target: memoryview) -> None:
        """Read the aligned range around `target`'s bytes, then copy them.

        numpy copies, because it lets other threads run meanwhile.
        """
        descriptor, direct = self._files[file]
        if not hasattr(self._buffers, "view"):
            self._buffers.view = memoryview(aligned_memory(_BUFFER_BYTES))
        begin = offset // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        skipped = offset - begin
        needed = skipped + len(target)
        whole = -(-needed // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        buffer = self._buffers.view[:whole]
        read_all(descriptor, buffer, needed, begin)
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(buffer, np.uint8)[skipped:needed])
        if not direct:
            drop_page_cache(descriptor, begin, whole)

    def dense(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._checkpoint.dense()
        self._checkpoint.forget_pages()

    def close(self) -> None:
        self._checkpoint.close()
        for descriptor, _ in self._files.values():
            os.close(descriptor)
        self._files.clear()
