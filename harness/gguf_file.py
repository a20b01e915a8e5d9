"""Writes the weights of a store as one GGUF file, which llama.cpp reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import torch
from safetensors import safe_open

from flashmoe.errors import FlashMoEError
from flashmoe.store.direct_io import drop_page_cache
from flashmoe.store.manifest import Manifest

_ARCHITECTURES = {"olmoe": gguf.MODEL_ARCH.OLMOE, "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE}


class _Tensor(NamedTuple):
    name: str
    shape: tuple[int, ...]
    bf16: bool  # else float32, which llama.cpp wants of norms and routers
    read: Callable[[], np.ndarray]  # bytes of bf16, or float32


def write(store: Path, manifest: Manifest, path: Path) -> None:
    """bf16 as in the store, tensor after tensor; memory is bounded by the largest.

    Raises FlashMoEError for a family whose tensors have no names here.
    """
    config = json.loads((store / "config.json").read_text())
    architecture = _ARCHITECTURES.get(config["model_type"])
    if architecture is None or manifest.layers[0].tensors[0].dtype != "bfloat16":
        raise FlashMoEError(
            f"{store}: {config['model_type']} is not written as GGUF here: only bfloat16 of "
            + ", ".join(_ARCHITECTURES)
        )
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    _describe(writer, config)
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    tensors = [*_dense(store / manifest.dense_file, names), *_experts(store, manifest, names)]
    for tensor in tensors:
        size = int(np.prod(tensor.shape)) * (2 if tensor.bf16 else 4)
        kind = gguf.GGMLQuantizationType.BF16 if tensor.bf16 else gguf.GGMLQuantizationType.F32
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.read())
    writer.close()
    for written in (path, store / manifest.experts_file):
        with open(written, "rb") as file:
            drop_page_cache(file.fileno())


def _describe(writer: gguf.GGUFWriter, config: dict[str, int]) -> None:
    heads = config["num_attention_heads"]
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_tokenizer_model("none")  # prompts are token ids


def _dense(path: Path, names: gguf.TensorNameMap) -> Iterator[_Tensor]:
    with safe_open(path, framework="pt", backend="pread") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    for key, shape in shapes.items():
        bf16 = len(shape) > 1 and not key.endswith(".gate.weight")
        yield _Tensor(_name(names, key), shape, bf16, _reader(path, key, bf16))


def _reader(path: Path, key: str, bf16: bool) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        with safe_open(path, framework="pt", backend="pread") as file:
            tensor = file.get_tensor(key)
        return tensor.contiguous().view(torch.uint8).numpy() if bf16 else tensor.float().numpy()

    return read


def _experts(store: Path, manifest: Manifest, names: gguf.TensorNameMap) -> Iterator[_Tensor]:
    """Every layer's gate, up and down: all experts of one kind side by side, as GGUF has them."""
    data = np.memmap(store / manifest.experts_file, np.uint16, "r")
    for layer in manifest.layers:
        gate_up, down = sorted(layer.tensors, key=lambda spec: spec.name, reverse=True)
        (twice, width), height = gate_up.shape, gate_up.shape[0] // 2
        assert (gate_up.name, down.name, twice) == ("gate_up_proj", "down_proj", 2 * height)
        start, stride = layer.offset_bytes // 2, layer.extent_bytes // 2
        whole = data[start : start + layer.n_experts * stride].reshape(layer.n_experts, stride)
        half, first = height * width, gate_up.offset_bytes // 2
        parts = {
            "gate_proj": (first, (height, width)),
            "up_proj": (first + half, (height, width)),
            "down_proj": (down.offset_bytes // 2, down.shape),
        }
        for kind, (offset, shape) in parts.items():
            name = _name(names, f"{layer.module}.{kind}.weight")
            part = whole[:, offset : offset + shape[0] * shape[1]]
            read = lambda part=part: np.ascontiguousarray(part)  # noqa: E731
            yield _Tensor(name, (layer.n_experts, *shape), True, read)


def _name(names: gguf.TensorNameMap, key: str) -> str:
    found = names.get_name(key, try_suffixes=(".weight",))
    if found is None:
        raise FlashMoEError(f"GGUF has no name for {key}")
    return str(found)
