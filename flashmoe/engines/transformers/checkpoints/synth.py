"""Checkpoints with a named model's real shapes and random weights, streamed to disk.

For measurements at full scale where the real weights cannot be had: bytes, reads and
arithmetic are the real model's, the text is not.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers

from flashmoe.disk.shards import header
from flashmoe.engines.transformers.model import empty_model, moe_modules
from flashmoe.errors import FlashMoEError, reading
from flashmoe.quant import NONE
from flashmoe.store.writer import Source, write_store
from flashmoe.util.sizes import format_bytes

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
    "deepseek-v2-lite": {  # deepseek-ai/DeepSeek-V2-Lite
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "n_shared_experts": 2,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "vocab_size": 102400,
        "max_position_embeddings": 4096,
    },
    "gpt-oss-20b": {  # openai/gpt-oss-20b, its MXFP4 experts as bf16
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "vocab_size": 201088,
        "max_position_embeddings": 4096,
    },
    "qwen3-30b-a3b": {  # Qwen/Qwen3-30B-A3B
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "vocab_size": 151936,
        "max_position_embeddings": 4096,
    },
    "mixtral-8x7b": {  # mistralai/Mixtral-8x7B-v0.1
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
}
# OLMoE at half the width: an expert of 3 MiB, for tables in minutes
MODELS["olmoe-quarter"] = MODELS["olmoe-1b-7b"] | {"hidden_size": 1024, "intermediate_size": 512}
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
    _refuse_occupied(directory)
    torch_dtype, config = _DTYPES[dtype], config_of(name, dtype)
    model = empty_model.build(config)
    shapes = {key: tuple(p.shape) for key, p in model.named_parameters()}
    sizes = {key: math.prod(shape) * torch_dtype.itemsize for key, shape in shapes.items()}
    total = sum(sizes.values())
    directory = directory.absolute()
    existing = next(p for p in (directory, *directory.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < total * 1.02:
        raise FlashMoEError(
            f"{directory}: {name} takes {format_bytes(total)} and the disk has "
            f"{format_bytes(free)} free"
        )
    partial = directory.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        partial.mkdir(parents=True)
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


def synthesise_store(
    name: str,
    store: Path,
    *,
    dtype: str = "bf16",
    seed: int = 0,
    progress: Callable[[int, int], object] = lambda done, total: None,
    weights: Callable[[transformers.PretrainedConfig, int], Source] | None = None,
    quant: str = NONE,
) -> None:
    """Write a store at once, for disks that do not hold the checkpoint beside it.

    weights: makes them of configuration and seed (default: RandomWeights).
    Raises FlashMoEError as `synthesise` and `pack` do.
    """
    _refuse_occupied(store)
    config = config_of(name, dtype)
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        source = (weights or RandomWeights)(config, seed)
        write_store(source, Path(folder), store, progress, quant)


def total_bytes(name: str, dtype: str = "bf16") -> int:
    """Bytes of all weights of a named model. Raises FlashMoEError for an unknown name."""
    model = empty_model.build(config_of(name, dtype))
    return sum(p.numel() for p in model.parameters()) * _DTYPES[dtype].itemsize


def _refuse_occupied(directory: Path) -> None:
    with reading(directory):
        if directory.exists() and not directory.is_dir():
            raise FlashMoEError(f"{directory} is a file: name a new directory")
        occupied = directory.exists() and any(directory.iterdir())
    if occupied:
        raise FlashMoEError(f"{directory} is not empty: name a new directory")


def config_of(name: str, dtype: str = "bf16") -> transformers.PretrainedConfig:
    """A named model's configuration. Raises FlashMoEError for an unknown name."""
    if name not in MODELS:
        raise FlashMoEError(f"no model is called {name!r}: choose from {', '.join(MODELS)}")
    settings = MODELS[name] | {"dtype": str(_DTYPES[dtype]).removeprefix("torch.")}
    config: transformers.PretrainedConfig = transformers.AutoConfig.for_model(**settings)
    config.architectures = settings["architectures"]
    return config


class RandomWeights:
    """A source for `write_store`: every tensor is drawn when it is asked for, always the same."""

    def __init__(self, config: transformers.PretrainedConfig, seed: int) -> None:
        self.config = config
        self.model = empty_model.build(config)
        self.experts = moe_modules.expert_modules(self.model)
        self.description = moe_modules.describe(self.model, config)
        self.seed = seed

    def expert(self, module_name: str, expert: int) -> dict[str, torch.Tensor]:
        parameters = moe_modules.expert_parameters(self.experts[module_name])
        return {
            name: self._draw(f"{module_name}.{name}.{expert}", tuple(p.shape[1:]), p.dtype)
            for name, p in parameters.items()
        }

    def dense(self) -> Iterator[tuple[str, torch.Tensor]]:
        held = moe_modules.expert_parameter_names(self.model)
        for key, tensor in self.model.state_dict().items():
            if key not in held:
                yield key, self._draw(key, tuple(tensor.shape), tensor.dtype)

    def forget_pages(self) -> None:
        pass

    def _draw(self, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {key}".encode()))
        return torch.cat(list(_values(key, shape, generator, dtype))).view(shape)


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
