"""Checkpoints with a named model's real shapes and random weights, streamed to disk.

For measurements at full scale where the real weights cannot be had: bytes, reads and
arithmetic are the real model's, the text is not.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from flashmoe import skeleton
from flashmoe.errors import FlashMoEError
from flashmoe.shards import header
from flashmoe.sizes import format_bytes

# The published config.json of each model, as far as it differs from transformers' defaults.
MODELS: dict[str, dict[str, Any]] = {
    "olmoe-1b-7b": {  # allenai/OLMoE-1B-7B-0924
        "model_type": "olmoe",
        "architectures": ["OlmoeForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "vocab_size": 50304,
        "max_position_embeddings": 4096,
    },
}
SHARD_BYTES = 2 << 30
_CHUNK_ELEMENTS = 8 << 20
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def synthesise(
    name: str,
    directory: Path,
    *,
    dtype: str = "bf16",
    seed: int = 0,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> None:
    """Write a Hugging Face directory in the module's own (fused) layout; memory is bounded.

    Raises FlashMoEError for an unknown name, an occupied directory or a disk too small.
    """
    if name not in MODELS:
        raise FlashMoEError(f"no model is called {name!r}: choose from {', '.join(MODELS)}")
    torch_dtype = _DTYPES[dtype]
    if directory.exists() and any(directory.iterdir()):
        raise FlashMoEError(f"{directory} is not empty: name a new directory")
    settings = dict(MODELS[name]) | {"dtype": str(torch_dtype).removeprefix("torch.")}
    config = transformers.AutoConfig.for_model(**settings)
    config.architectures = settings["architectures"]
    model = skeleton.build(config)
    shapes = {key: tuple(p.shape) for key, p in model.named_parameters()}
    sizes = {key: math.prod(shape) * torch_dtype.itemsize for key, shape in shapes.items()}
    total = sum(sizes.values())
    existing = next(p for p in (directory, *directory.resolve().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < total * 1.02:
        raise FlashMoEError(
            f"{directory}: {name} takes {format_bytes(total)} and the disk has "
            f"{format_bytes(free)} free"
        )
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        shards: list[list[str]] = [[]]
        for key in shapes:
            if sum(sizes[k] for k in shards[-1]) + sizes[key] > SHARD_BYTES and shards[-1]:
                shards.append([])
            shards[-1].append(key)
        generator = torch.Generator().manual_seed(seed)
        weight_map: dict[str, str] = {}
        done = 0
        for number, keys in enumerate(shards, start=1):
            file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            weight_map |= dict.fromkeys(keys, file_name)
            with open(partial / file_name, "wb") as file:
                file.write(header({key: (torch_dtype, shapes[key]) for key in keys}))
                for key in keys:
                    for piece in _values(key, shapes[key], generator, torch_dtype):
                        file.write(piece.view(torch.uint8).numpy().data)
                        done += piece.numel() * torch_dtype.itemsize
                        progress(done, total)
                file.flush()
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index))
        config.save_pretrained(partial)
        if directory.exists():
            directory.rmdir()
        partial.rename(directory)
    except OSError as error:
        raise FlashMoEError(f"{directory}: writing stopped ({error.strerror or error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _values(key: str, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    """Pieces of a tensor: ones for norms, else uniform with a spread that keeps activations finite.

    Every chunk is the same random block, rolled: drawing 7 billion numbers would take minutes.
    """
    elements = math.prod(shape)
    if len(shape) == 1:
        yield torch.ones(elements, dtype=dtype)
        return
    scale = math.sqrt(3 / shape[-1])
    block = torch.empty(min(_CHUNK_ELEMENTS, elements)).uniform_(-scale, scale, generator=generator)
    block = block.to(dtype)
    done = 0
    while done < elements:
        piece = block[: elements - done]
        yield piece
        done += piece.numel()
        block = block.roll(1_000_003)
