"""Writes a store, streaming: memory is bounded by a few experts.

A store changes at the moment at which its manifest is renamed. Before that, the data files have
names that no manifest has; after it, files that the manifest does not name are removed. A pack
that dies at any point therefore leaves the previous store as it was.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
import xxhash

from flashmoe import quant as schemes
from flashmoe.disk.direct_io import aligned_memory, drop_page_cache, open_direct, reserve, write_all
from flashmoe.disk.shards import header
from flashmoe.errors import FlashMoEError, reading
from flashmoe.quant import NONE, Quantiser
from flashmoe.store import manifest as manifests
from flashmoe.store import side_files
from flashmoe.store.layout import ModelDescription, config_digest, lay_out_layers, stored_tensors
from flashmoe.store.manifest import LayerSpec, Manifest
from flashmoe.util.sizes import format_bytes

Progress = Callable[[int, int], object]  # (bytes done, bytes in all)


class Source(Protocol):
    """What a store is written from: a checkpoint, or random weights."""

    gives_back: bool  # of the disk what was read of experts, at `forget_pages`

    @property
    def description(self) -> ModelDescription:
        """The model's architecture, top_k and dtype, and the shapes of its experts."""

    def expert(self, module_name: str, expert: int) -> dict[str, torch.Tensor]:
        """One expert's parameters by name, contiguous, without the expert dimension.

        Where the description names a format: the parts of its weights as they were published.
        """

    def dense(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every other tensor with its name in the model, one at a time. It is called twice."""

    def forget_pages(self) -> None:
        """Let the kernel drop the pages of what was read. Called after each layer's experts."""


def write_store(
    source: Source, checkpoint: Path, store: Path, progress: Progress, quant: str = NONE
) -> Manifest:
    """Write the directory `store` from `source`, with the files beside `checkpoint`'s weights.

    progress: called with the bytes of experts that were written, and with those in all.
    quant: the name of a quantiser of `flashmoe.quant`.
    Raises FlashMoEError when the disk is full, another pack into `store` is under way, or `store`
    is of another model; a store that was there stays usable then.
    """
    scheme = schemes.quantiser(quant)
    is_new = not _directory_exists(store, checkpoint)
    model = source.description
    layers = lay_out_layers(model, scheme)
    experts_bytes = layers[-1].end_bytes
    try:
        store.mkdir(parents=True, exist_ok=True)
        with _locked(store), _data_names(store) as (experts_name, dense_name):
            free_bytes = shutil.disk_usage(store).free
            layer_bytes = max(layer.n_experts * layer.extent_bytes for layer in layers)
            needed_bytes = layer_bytes if source.gives_back else experts_bytes
            if free_bytes < needed_bytes:
                raise FlashMoEError(
                    f"{store}: the store needs {format_bytes(needed_bytes)} and the disk has "
                    f"{format_bytes(free_bytes)} free"
                )
            layers = _write_experts(source, scheme, layers, store / experts_name, progress)
            dense_bytes = _write_dense(source, store / dense_name)
            side_files.copy(checkpoint, store)
            manifest = Manifest(
                architecture=model.architecture,
                config_sha256=config_digest(store),
                top_k=model.top_k,
                experts_file=experts_name,
                dense_file=dense_name,
                dense_bytes=dense_bytes,
                layers=tuple(layers),
                quantisation=layers[0].quantisation,
                layout=scheme.layout() if scheme else "",
                dtype=manifests.dtype_name(model.dtype),
            )
            manifest.save(store)
            return manifest
    except OSError as error:
        raise FlashMoEError(
            f"{store}: packing stopped ({error.strerror or error}); "
            "a store that was there before is unchanged"
        ) from None
    finally:
        if is_new and store.is_dir() and not manifests.is_store(store):
            shutil.rmtree(store, ignore_errors=True)


def _directory_exists(store: Path, checkpoint: Path) -> bool:
    """Is `store` a directory already? Raises FlashMoEError where it must not be packed into."""
    with reading(store):
        if not store.exists():
            return False
        if not store.is_dir():
            raise FlashMoEError(f"{store} is a file: name a directory for the store")
        if store.samefile(checkpoint):
            raise FlashMoEError(f"{store} is the checkpoint itself: name another directory")
        if manifests.is_store(store) and config_digest(store) != config_digest(checkpoint):
            raise FlashMoEError(
                f"{store} is a store of another model than {checkpoint}: name another directory, "
                "or remove that store first"
            )
    return True


@contextmanager
def _locked(store: Path) -> Iterator[None]:
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
def _data_names(store: Path) -> Iterator[tuple[str, str]]:
    """New names for the files of experts and of all else.

    Afterwards, data files that the manifest does not name are removed.
    """
    token = secrets.token_hex(4)
    try:
        yield f"experts-{token}.bin", f"dense-{token}.safetensors"
    finally:
        names_in_manifest: set[str] = set()
        if manifests.is_store(store):
            document = json.loads((store / manifests.FILE_NAME).read_text())
            names_in_manifest = {document.get("experts_file"), document.get("dense_file")}
        leftovers = [*store.glob("experts-*.bin"), *store.glob("dense-*.safetensors")]
        for path in leftovers + list(store.rglob(".*.partial")):
            if path.name not in names_in_manifest:
                path.unlink(missing_ok=True)


def _write_experts(
    source: Source,
    scheme: Quantiser | None,
    layers: list[LayerSpec],
    path: Path,
    progress: Progress,
) -> list[LayerSpec]:
    """Write every extent into a new file at `path`; the result has their checksums."""
    experts_bytes = layers[-1].end_bytes
    descriptor, _ = open_direct(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        if not source.gives_back:
            reserve(descriptor, experts_bytes)
        written_layers = []
        for layer, shapes in zip(layers, source.description.layers, strict=True):
            checksums = []
            extent = aligned_memory(layer.extent_bytes)
            view = memoryview(extent)[: layer.extent_bytes]
            for expert in range(layer.n_experts):
                parameters = source.expert(layer.module, expert)
                tensors = stored_tensors(parameters, scheme, transposed=shapes.transposed)
                _fill(extent, layer, tensors)
                checksums.append(xxhash.xxh3_64_hexdigest(view))
                write_all(descriptor, view, layer.extent_offset(expert))
                progress(layer.extent_offset(expert + 1), experts_bytes)
            written_layers.append(replace(layer, checksums=tuple(checksums)))
            source.forget_pages()
        os.fsync(descriptor)
        drop_page_cache(descriptor)  # pages are there only where direct I/O was refused
        return written_layers
    finally:
        os.close(descriptor)


def _fill(extent: mmap.mmap, layer: LayerSpec, tensors: dict[str, torch.Tensor]) -> None:
    """Put one expert's tensors where `layer` has them; the gaps between them stay zero."""
    for spec in layer.tensors:
        data = tensors[spec.name].contiguous().view(-1).view(torch.uint8).numpy()
        extent[spec.offset_bytes : spec.offset_bytes + spec.size_bytes] = data.data


def _write_dense(source: Source, path: Path) -> int:
    """Write a safetensors file of all non-expert tensors, one at a time; returns its bytes.

    safetensors' own writer needs all tensors in memory at once. The header comes first and has
    every tensor's offset, so the tensors are read twice.
    """
    with open(path, "xb") as file:
        entries = {name: (t.dtype, tuple(t.shape)) for name, t in source.dense()}
        file.write(header(entries))
        for _, tensor in source.dense():
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
        source.forget_pages()
        return file.tell()
