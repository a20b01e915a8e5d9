"""Writes a store from a checkpoint, streaming: memory is bounded by a few experts.

The manifest's rename is the moment at which a store changes. Before it, the data files have
names that no manifest knows; after it, files that the manifest does not name are removed. A
pack that dies at any point therefore leaves the previous store as it was.
"""

from __future__ import annotations

import fcntl
import hashlib
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
import transformers
import xxhash

from flashmoe import quant as schemes
from flashmoe.disk.direct_io import aligned_memory, drop_page_cache, open_direct, reserve, write_all
from flashmoe.disk.shards import header
from flashmoe.engines.transformers import dense_weights, skeleton
from flashmoe.engines.transformers.checkpoint import REMEDY, Checkpoint
from flashmoe.errors import FlashMoEError, reading
from flashmoe.quant import NONE, Scheme
from flashmoe.store import manifest as manifests
from flashmoe.store import side_files
from flashmoe.store.manifest import LayerSpec, Manifest, lay_out
from flashmoe.util.sizes import format_bytes

Progress = Callable[[int, int], object]  # (bytes done, bytes in all)


def pack(
    checkpoint: Path, store: Path, *, quant: str = NONE, progress: Progress = lambda d, t: None
) -> Manifest:
    """Pack the Hugging Face directory `checkpoint` into the directory `store`.

    Raises FlashMoEError when the checkpoint is unusable, the disk full, another pack into
    `store` under way, or `store` of another model; a store that was there stays usable then.
    """
    with Checkpoint(checkpoint) as source:
        model = skeleton.build(source.config, source.dtype)
        dense_weights.check_complete(model, source.dense(meta=True), checkpoint, REMEDY)
        return write_store(source, checkpoint, store, progress, quant)


class Source(Protocol):
    """What a store is written from: a checkpoint, or weights made on the way (see `synth`)."""

    config: transformers.PretrainedConfig
    model: transformers.PreTrainedModel
    experts: dict[str, torch.nn.Module]

    def expert(self, module_name: str, expert: int) -> dict[str, torch.Tensor]: ...
    def dense(self) -> Iterator[tuple[str, torch.Tensor]]: ...
    def forget_pages(self) -> None: ...


def write_store(
    source: Source, checkpoint: Path, store: Path, progress: Progress, quant: str = NONE
) -> Manifest:
    """`pack`, from a source of weights and a directory with the files that go beside them."""
    scheme = schemes.get(quant)
    made = not _is_there(store, checkpoint)
    layers = lay_out_layers(source, scheme)
    total = layers[-1].end_bytes
    try:
        store.mkdir(parents=True, exist_ok=True)
        with _exclusive(store), _data_names(store) as (experts_name, dense_name):
            free = shutil.disk_usage(store).free
            if free < total:
                raise FlashMoEError(
                    f"{store}: the store needs {format_bytes(total)} and the disk has "
                    f"{format_bytes(free)} free"
                )
            layers = _write_experts(source, scheme, layers, store / experts_name, progress)
            dense_bytes = _write_dense(source, store / dense_name)
            side_files.copy(checkpoint, store)
            manifest = Manifest(
                architecture=type(source.model).__name__,
                config_sha256=config_digest(store),
                top_k=skeleton.top_k(source.config),
                experts_file=experts_name,
                dense_file=dense_name,
                dense_bytes=dense_bytes,
                layers=tuple(layers),
                quantisation=quant,
                layout=scheme.layout() if scheme else "",
                dtype=manifests.dtype_name(source.model.config.dtype),
            )
            manifest.save(store)
            return manifest
    except OSError as error:
        raise FlashMoEError(
            f"{store}: packing stopped ({error.strerror or error}); "
            "a store that was there before is unchanged"
        ) from None
    finally:
        if made and store.is_dir() and not manifests.is_store(store):
            shutil.rmtree(store, ignore_errors=True)


def _is_there(store: Path, checkpoint: Path) -> bool:
    """Is `store` a directory already? Raises FlashMoEError where none may be packed into."""
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


def config_digest(directory: Path) -> str:
    """sha256 of the directory's config.json; of nothing where it has none."""
    path = directory / "config.json"
    return hashlib.sha256(path.read_bytes() if path.is_file() else b"").hexdigest()


def lay_out_layers(source: Source, scheme: Scheme | None) -> list[LayerSpec]:
    """Every MoE layer's extents, one after the other; checksums are not known yet."""
    layers: list[LayerSpec] = []
    for module_name, module in source.experts.items():
        empty = {
            name: torch.zeros(parameter.shape[1:], dtype=parameter.dtype)
            for name, parameter in skeleton.expert_parameters(module).items()
        }
        tensors = [
            (name, tensor.dtype, tuple(tensor.shape))
            for name, tensor in _quantised(module, empty, scheme).items()
        ]
        offset = layers[-1].end_bytes if layers else 0
        count, kind = skeleton.n_experts(module), scheme.name if scheme else NONE
        layers.append(lay_out(module_name, count, offset, tensors, kind))
    return layers


def _quantised(
    module: torch.nn.Module, tensors: dict[str, torch.Tensor], scheme: Scheme | None
) -> dict[str, torch.Tensor]:
    """An expert's tensors as they are stored: weights in parts, always [out, in]; biases as is."""
    if scheme is None:
        return tensors
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            weight = tensor.T if module.is_transposed else tensor
            stored |= {
                schemes.part_name(name, part): held for part, held in scheme.parts(weight).items()
            }
        else:
            stored[name] = tensor
    return stored


@contextmanager
def _exclusive(store: Path) -> Iterator[None]:
    """One pack at a time into a directory; the lock dies with the process."""
    # not followed, should it be a link: whoever made this directory may not be trusted
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(store / ".lock", flags, 0o644), "r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FlashMoEError(f"{store}: another pack into it is under way") from None
        yield


@contextmanager
def _data_names(store: Path) -> Iterator[tuple[str, str]]:
    """Fresh names for the data files; afterwards removes what the manifest does not name."""
    token = secrets.token_hex(4)
    try:
        yield f"experts-{token}.bin", f"dense-{token}.safetensors"
    finally:
        kept: set[str] = set()
        if manifests.is_store(store):
            document = json.loads((store / manifests.FILE_NAME).read_text())
            kept = {document.get("experts_file"), document.get("dense_file")}
        leftovers = [*store.glob("experts-*.bin"), *store.glob("dense-*.safetensors")]
        for path in leftovers + list(store.rglob(".*.partial")):
            if path.name not in kept:
                path.unlink(missing_ok=True)


def _write_experts(
    source: Source,
    scheme: Scheme | None,
    layers: list[LayerSpec],
    path: Path,
    progress: Progress,
) -> list[LayerSpec]:
    total = layers[-1].end_bytes
    descriptor, _ = open_direct(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        reserve(descriptor, total)
        finished = []
        for layer in layers:
            checksums = []
            extent = aligned_memory(layer.extent_bytes)
            view = memoryview(extent)[: layer.extent_bytes]
            for expert in range(layer.n_experts):
                tensors = source.expert(layer.module, expert)
                _fill(extent, layer, _quantised(source.experts[layer.module], tensors, scheme))
                checksums.append(xxhash.xxh3_64_hexdigest(view))
                write_all(descriptor, view, layer.extent_offset(expert))
                progress(layer.extent_offset(expert + 1), total)
            finished.append(replace(layer, checksums=tuple(checksums)))
            source.forget_pages()
        os.fsync(descriptor)
        drop_page_cache(descriptor)  # which has pages of it only where direct I/O is refused
        return finished
    finally:
        os.close(descriptor)


def _fill(extent: mmap.mmap, layer: LayerSpec, tensors: dict[str, torch.Tensor]) -> None:
    for spec in layer.tensors:
        data = tensors[spec.name].contiguous().view(-1).view(torch.uint8).numpy()
        extent[spec.offset_bytes : spec.offset_bytes + spec.size_bytes] = data.data


def _write_dense(source: Source, path: Path) -> int:
    """A safetensors file of all non-expert tensors, written one tensor at a time.

    The header comes first and needs every offset, so the tensors are read twice: safetensors'
    own writer wants all of them in memory at once.
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
