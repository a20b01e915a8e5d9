"""Writes a store, streaming: memory is bounded by a few experts.

A store changes at the moment at which its manifest is renamed. Before that, the data files have
names that no manifest has; after it, files that the manifest does not name are removed. A pack
that dies at any point therefore leaves the previous store as it was. Of several folders the
store's own changes last, and files go after that.
"""

from __future__ import annotations

import itertools
import mmap
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
import xxhash

from flashmoe import quant as schemes
from flashmoe.disk.direct_io import aligned_memory, drop_page_cache, open_direct, reserve, write_all
from flashmoe.disk.shards import header
from flashmoe.errors import FlashMoEError
from flashmoe.quant import NONE, Quantiser
from flashmoe.store import folders as side_folders
from flashmoe.store import manifest as manifests
from flashmoe.store import pack_folders, side_files
from flashmoe.store.layout import ModelDescription, config_digest, lay_out_layers, stored_tensors
from flashmoe.store.manifest import LayerSpec, Manifest
from flashmoe.store.shares import Shares

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
    source: Source,
    checkpoint: Path,
    store: Path,
    progress: Progress,
    quant: str = NONE,
    also: Sequence[Path] = (),
    *,
    stripe: bool = False,
) -> Manifest:
    """Write the directory `store` from `source`, with the files beside `checkpoint`'s weights.

    progress: called with the bytes of experts that were written, and with those in all.
    quant: the name of a quantiser of `flashmoe.quant`. also: directories that become stores of the
    same, or with `stripe` get a share of the experts each.
    Raises FlashMoEError when a disk is full, another pack into a directory is under way, or one
    is of another model; a store that was there stays usable then.
    """
    scheme = schemes.quantiser(quant)
    folders = [store, *also]
    pack_folders.check_distinct(folders)
    new = [folder for folder in folders if not pack_folders.exists(folder, checkpoint)]
    ours: list[Path] = []  # to remove where nothing comes of it
    model = source.description
    layers = lay_out_layers(model, scheme)
    token = secrets.token_hex(4)
    manifest = Manifest(
        architecture=model.architecture,
        config_sha256="",
        top_k=model.top_k,
        experts_file=f"experts-{token}.bin",
        dense_file=f"dense-{token}.safetensors",
        dense_bytes=0,
        layers=tuple(layers),
        quantisation=layers[0].quantisation,
        layout=scheme.layout() if scheme else "",
        dtype=manifests.dtype_name(model.dtype),
        shares=len(folders) if stripe else 1,
        folders_file=f"folders-{token}.json" if also else "",
    )
    shares = Shares(layers, manifest.shares)
    layer_bytes = 0  # what is written before its source gives as much back
    if source.gives_back:
        layer_bytes = max(layer.n_experts * layer.extent_bytes for layer in layers)
    try:
        with ExitStack() as held:
            for number, folder in enumerate(folders):
                folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(pack_folders.locked(folder))
                ours += [folder] if folder in new else []
                held.enter_context(pack_folders.without_leftovers(folder, store))
                here_bytes = layer_bytes if folder == store else 0
                here_bytes = here_bytes or shares.file_bytes(number * stripe)
                pack_folders.check_room(folder, here_bytes)
            if stripe:
                names = map(manifest.share_file, range(manifest.shares))
                files = [[a / b for a, b in zip(folders, names, strict=True)]]
            else:
                files = [[folder / manifest.experts_file] for folder in folders]
            layers = _write_experts(source, scheme, layers, files, progress)
            dense_bytes = _write_dense(source, store / manifest.dense_file)
            for folder in folders:
                side_files.copy(checkpoint, folder)
            manifest = replace(
                manifest,
                config_sha256=config_digest(store),
                dense_bytes=dense_bytes,
                layers=tuple(layers),
            )
            _publish(folders, manifest)
            return manifest
    except OSError as error:
        raise FlashMoEError(
            f"{' and '.join(map(str, folders))}: packing stopped ({error.strerror or error}); "
            "a store that was there before is unchanged"
        ) from None
    finally:
        for folder in ours:
            if folder.is_dir() and not manifests.is_store(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _publish(folders: Sequence[Path], manifest: Manifest) -> None:
    """Make all folders what they are to be: the store's own, which is the first, at the end."""
    store = folders[0]
    for number, folder in reversed(list(enumerate(folders))):
        here = manifest
        if number and manifest.shares > 1:
            here = replace(
                manifest,
                experts_file=manifest.share_file(number),
                dense_file="",
                dense_bytes=0,
                share=number,
                folders_file="",
            )
        elif number:
            shutil.copyfile(store / manifest.dense_file, folder / manifest.dense_file)
            with open(folder / manifest.dense_file, "rb+") as file:
                os.fsync(file.fileno())
                drop_page_cache(file.fileno())
        if here.folders_file:
            others = [other for other in folders if other != folder]
            side_folders.write(folder / here.folders_file, others)
        here.save(folder)


def _write_experts(
    source: Source,
    scheme: Quantiser | None,
    layers: list[LayerSpec],
    files: list[list[Path]],
    progress: Progress,
) -> list[LayerSpec]:
    """Write every extent into new files, of each copy one a share; the result has checksums."""
    experts_bytes, shares = layers[-1].end_bytes, Shares(layers, len(files[0]))
    descriptors: list[list[int]] = [[] for _ in files]
    try:
        for copy, paths in zip(descriptors, files, strict=True):
            for share, path in enumerate(paths):
                copy.append(open_direct(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)[0])
                if not source.gives_back:
                    reserve(copy[-1], shares.file_bytes(share))
        written_layers = []
        for number, (layer, shapes) in enumerate(
            zip(layers, source.description.layers, strict=True)
        ):
            checksums = []
            extent = aligned_memory(layer.extent_bytes)
            view = memoryview(extent)[: layer.extent_bytes]
            for expert in range(layer.n_experts):
                parameters = source.expert(layer.module, expert)
                tensors = stored_tensors(parameters, scheme, transposed=shapes.transposed)
                _fill(extent, layer, tensors)
                checksums.append(xxhash.xxh3_64_hexdigest(view))
                for share, at, start, end in shares.ranges(number, expert, 0, len(view)):
                    for copy in descriptors:
                        write_all(copy[share], view[start:end], at)
                progress(layer.extent_offset(expert + 1), experts_bytes)
            written_layers.append(replace(layer, checksums=tuple(checksums)))
            source.forget_pages()
        for descriptor in itertools.chain(*descriptors):
            os.fsync(descriptor)
            drop_page_cache(descriptor)  # pages are there only where direct I/O was refused
        return written_layers
    finally:
        for descriptor in itertools.chain(*descriptors):
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
