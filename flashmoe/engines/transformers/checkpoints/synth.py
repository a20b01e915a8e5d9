"""Writes a named model's real shapes with random weights, as a checkpoint or as a store.

For measurements at full scale where the real weights cannot be had: bytes, reads and
arithmetic are the real model's, the text is not.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers

from flashmoe.disk.files import check_room
from flashmoe.disk.shards import header
from flashmoe.engines.transformers.checkpoints.named_models import DTYPE_OPTIONS, config_of
from flashmoe.engines.transformers.checkpoints.random_weights import (
    RandomParts,
    RandomWeights,
    blocks,
)
from flashmoe.engines.transformers.checkpoints.weight_files import INDEX_NAME
from flashmoe.engines.transformers.model import empty_model
from flashmoe.errors import FlashMoEError, reading
from flashmoe.quant import NONE, formats
from flashmoe.store.writer import Progress, Source, write_store

SHARD_BYTES = 2 << 30  # of tensors, at most, in one file of a checkpoint, unless one is larger


def synthesise(
    name: str,
    directory: Path,
    *,
    dtype: str = "bf16",
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> None:
    """Write a Hugging Face directory in the module's own (fused) layout; memory is bounded.

    name: of `named_models.MODELS`; dtype: of `named_models.DTYPE_OPTIONS`.
    progress: called with the bytes written and the bytes in all.
    Raises FlashMoEError for an unknown name, an occupied directory or a disk too small.
    """
    _refuse_occupied(directory)
    torch_dtype, config = DTYPE_OPTIONS[dtype], config_of(name, dtype)
    model = empty_model.build(config)
    shapes = {key: tuple(p.shape) for key, p in model.named_parameters()}
    sizes = {key: math.prod(shape) * torch_dtype.itemsize for key, shape in shapes.items()}
    total = sum(sizes.values())
    directory = directory.absolute()
    check_room(directory, name, total)
    partial = directory.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        partial.mkdir(parents=True)
        shards = _divide(sizes)
        generator = torch.Generator().manual_seed(seed)
        weight_map: dict[str, str] = {}
        done = 0
        for number, keys in enumerate(shards, start=1):
            file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            weight_map |= dict.fromkeys(keys, file_name)
            with open(partial / file_name, "wb") as file:
                file.write(header({key: (torch_dtype, shapes[key]) for key in keys}))
                for key in keys:
                    for block in blocks(shapes[key], generator, torch_dtype):
                        file.write(block.view(torch.uint8).numpy().data)
                        done += block.numel() * torch_dtype.itemsize
                        progress(done, total)
                file.flush()
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (partial / INDEX_NAME).write_text(json.dumps(index))
        config.save_pretrained(partial)
        if directory.exists():
            directory.rmdir()
        partial.rename(directory)
    except OSError as error:
        raise FlashMoEError(f"{directory}: writing stopped ({error.strerror or error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def synthesise_store(
    name: str,
    store: Path,
    *,
    dtype: str = "bf16",
    seed: int = 0,
    progress: Progress = lambda done, total: None,
    weights: Callable[[transformers.PretrainedConfig, int], Source] | None = None,
    quant: str = NONE,
) -> None:
    """Write a store at once, for disks that do not hold the checkpoint beside it.

    weights: makes them of configuration and seed (default: RandomWeights). quant: as for `pack`,
    or a format in which checkpoints are published. The rest is as for `synthesise` and `pack`, and
    so are the errors raised.
    """
    _refuse_occupied(store)
    config = config_of(name, dtype)
    if quant in formats():
        weights, quant = partial(RandomParts, format=formats()[quant]()), NONE
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        source = (weights or RandomWeights)(config, seed)
        write_store(source, Path(folder), store, progress, quant)


def _refuse_occupied(directory: Path) -> None:
    with reading(directory):
        if directory.exists() and not directory.is_dir():
            raise FlashMoEError(f"{directory} is a file: name a new directory")
        occupied = directory.exists() and any(directory.iterdir())
    if occupied:
        raise FlashMoEError(f"{directory} is not empty: name a new directory")


def _divide(sizes: dict[str, int]) -> list[list[str]]:
    """The tensors of each shard, in order; sizes: every tensor's bytes by its name."""
    shards: list[list[str]] = [[]]
    for key, size in sizes.items():
        if sum(sizes[k] for k in shards[-1]) + size > SHARD_BYTES and shards[-1]:
            shards.append([])
        shards[-1].append(key)
    return shards
