"""Writes a source of weights as one GGUF file, or as the parts of a split one."""

from __future__ import annotations

import glob
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

from flashmoe.disk.direct_io import drop_page_cache
from flashmoe.disk.files import check_room
from flashmoe.engines.llama.files import architectures, quantisation
from flashmoe.engines.llama.files.architecture import Architecture
from flashmoe.errors import FlashMoEError, reading
from flashmoe.store.layout import ModelDescription

Progress = Callable[[int, int], object]  # (bytes done, bytes in all)
_STEP_ELEMENTS = 8 << 20  # of a tensor, at most, that are made ready at once


class Weights(Protocol):
    """What is written: a model of transformers, a tensor at a time. `expert` is thread-safe."""

    config: Any  # of transformers
    description: ModelDescription

    def dense_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor that belongs to no expert, by its name in the model."""

    def dense(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Those tensors themselves."""

    def expert(self, module_name: str, expert: int) -> dict[str, torch.Tensor]:
        """One expert's parameters by name, without the expert dimension."""


@dataclass(frozen=True)
class Planned:
    """A tensor of the file that will be."""

    shape: tuple[int, ...]
    kind: Kind

    @property
    def size_bytes(self) -> int:
        return quantisation.size_bytes(self.shape, self.kind)


@dataclass(frozen=True)
class _Place:
    """Where a tensor's bytes go."""

    descriptor: int
    offset: int
    kind: Kind

    def write(self, tensor: torch.Tensor, skip_bytes: int = 0) -> int:
        """Write the values from `skip_bytes` of the tensor on; the bytes that this makes."""
        data = quantisation.encode(tensor, self.kind).data
        done = 0
        while done < len(data):
            done += os.pwrite(self.descriptor, data[done:], self.offset + skip_bytes + done)
        return done


def write(
    source: Weights,
    path: Path,
    quantise: str,
    *,
    split_bytes: int = 0,
    first_part_empty: bool = False,
    fuse: bool = False,
    head_only: bool = False,
    progress: Progress = lambda done, total: None,
) -> list[Path]:
    """Write `path`, or its parts "-00001-of-0000N" beside it; returns what was written, in order.

    quantise: see `quantisation.recipe`. split_bytes: of tensors, at most, in one part, unless one
    is larger; 0 is one file. first_part_empty: a split file's first part has settings only.
    fuse: gate and up are one tensor. head_only: all else is a hole. Memory is bounded by a few
    experts.
    Raises FlashMoEError for a family or a quantisation that cannot be written, a path that is
    taken, and a disk too small.
    """
    path = path.absolute()
    _refuse_taken(path)
    architecture = architectures.of(source.config.to_dict())
    tensors = plan(source, quantise, fuse=fuse)
    total = sum(planned.size_bytes for planned in tensors.values())
    partial = path.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        check_room(path, path.name, 0 if head_only else total)
        partial.mkdir()
        writer = gguf.GGUFWriter(
            partial / path.name,
            gguf.MODEL_ARCH_NAMES[architecture.gguf_name],
            split_max_size=split_bytes,
            small_first_shard=first_part_empty,
        )
        architecture.describe(writer)
        for name, planned in tensors.items():
            shape, size = planned.shape, planned.size_bytes
            writer.add_tensor_info(name, shape, np.dtype(np.float32), size, planned.kind)
        done = 0
        with ExitStack() as stack:
            places = _write_heads(writer, stack)
            for count in () if head_only else _write_tensors(source, architecture, places, fuse):
                done += count
                progress(done, total)
            for descriptor in {place.descriptor for place in places.values()}:
                os.fsync(descriptor)
                drop_page_cache(descriptor)
        parts = sorted(partial.iterdir())
        for part in parts:
            part.rename(path.with_name(part.name))
        return [path.with_name(part.name) for part in parts]
    except OSError as error:
        raise FlashMoEError(f"{path}: writing stopped ({error.strerror or error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _refuse_taken(path: Path) -> None:
    with reading(path.parent):
        parts = sorted(path.parent.glob(f"{glob.escape(path.stem)}-?????-of-?????.gguf"))
        taken = [path] if path.exists() else parts
    if taken:
        raise FlashMoEError(f"{taken[0]} is there already: name a new file")


def plan(source: Weights, quantise: str, *, fuse: bool = False) -> dict[str, Planned]:
    """Every tensor of the file by name, in order: each layer's experts after all others.

    The parameters are those of `write`, and so are the errors raised.
    """
    architecture = architectures.of(source.config.to_dict())
    recipe = quantisation.recipe(quantise)
    tensors = {}

    def add(name: str, shape: tuple[int, ...], *, vectors: bool = False) -> None:
        kind = recipe.kind(
            name, shape, architecture.layers, architecture.n_experts, vectors=vectors
        )
        tensors[name] = Planned(shape, kind)

    for key, shape in source.dense_shapes().items():
        for name, tensor in architecture.dense(key, torch.empty(shape, device="meta")):
            add(name, tuple(tensor.shape))
    for layer in source.description.layers:
        parameters = {
            name: torch.empty(shape, dtype=dtype, device="meta")
            for name, (dtype, shape) in layer.parameters.items()
        }
        for name, tensor in architecture.expert(parameters, fuse=fuse).items():
            shape = (layer.n_experts, *tensor.shape)
            add(f"{_block(layer.module)}.{name}", shape, vectors=tensor.dim() == 1)
    quantisation.check({planned.kind for planned in tensors.values()})
    return tensors


def _block(module_name: str) -> str:
    found = re.search(r"layers\.(\d+)\.", module_name)
    if found is None:
        raise FlashMoEError(f"GGUF has no name for the experts of {module_name}")
    return f"blk.{found[1]}"


def _write_heads(writer: gguf.GGUFWriter, stack: ExitStack) -> dict[str, _Place]:
    """Write what comes before the tensors' bytes; where these go, by tensor."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    alignment = writer.data_alignment
    paths = [Path(file.name) for file in writer.fout]
    starts = [-(-file.tell() // alignment) * alignment for file in writer.fout]
    writer.close()
    places = {}
    for path, offset, tensors in zip(paths, starts, writer.tensors, strict=True):
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, descriptor)
        for name, info in tensors.items():
            places[name] = _Place(descriptor, offset, info.dtype)
            offset += -(-info.nbytes // alignment) * alignment
        os.ftruncate(descriptor, offset)
    return places


def _write_tensors(
    source: Weights, architecture: Architecture, places: dict[str, _Place], fuse: bool
) -> Iterator[int]:
    """Yields the bytes that were written, each time."""
    for key, tensor in source.dense():
        for name, values in architecture.dense(key, tensor):
            yield from _write_in_steps(values, places[name])

    def write_expert(module_name: str, expert: int) -> int:
        """Experts of a layer lie side by side in each of its tensors."""
        count = 0
        parameters = architecture.expert(source.expert(module_name, expert), fuse=fuse)
        for name, values in parameters.items():
            place = places[f"{_block(module_name)}.{name}"]
            size = quantisation.size_bytes(tuple(values.shape), place.kind)
            count += place.write(values, expert * size)
        return count

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for layer in source.description.layers:
            names = [layer.module] * layer.n_experts
            yield from threads.map(write_expert, names, range(layer.n_experts))


def _write_in_steps(values: torch.Tensor, place: _Place) -> Iterator[int]:
    """A row at least at a time, so that no large tensor is copied whole."""
    rows = values if values.dim() == 1 else values.reshape(-1, values.shape[-1])
    step = len(rows) if values.dim() == 1 else max(_STEP_ELEMENTS // rows.shape[1], 1)
    bounds = [*range(0, len(rows), step), len(rows)]
    done = 0
    for start, end in pairwise(bounds):
        count = place.write(rows[start:end], done)
        done += count
        yield count
