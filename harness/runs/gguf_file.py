"""Writes a source of weights as one GGUF file, which llama.cpp reads."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

from flashmoe import quant
from flashmoe.disk.direct_io import drop_page_cache
from flashmoe.engines.transformers.checkpoints.random_weights import RandomWeights
from flashmoe.engines.transformers.model import moe_modules
from flashmoe.errors import FlashMoEError

_ARCHITECTURES = {"olmoe": gguf.MODEL_ARCH.OLMOE, "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE}
# Of experts; what comes nearest to our schemes in bits a weight (8.5 to 8, 4.5 to 5).
_KINDS = {quant.NONE: Kind.BF16, "int8": Kind.Q8_0, "int4": Kind.Q4_0}


def write(source: RandomWeights, path: Path, scheme: str = quant.NONE) -> None:
    """Experts as `scheme` says, norms and routers float32, the rest bf16, as llama.cpp has it.

    Memory is bounded by a layer's experts of one kind. Raises FlashMoEError for a family or a
    scheme that has no counterpart.
    """
    config = source.config.to_dict()
    architecture = _ARCHITECTURES.get(config["model_type"])
    if architecture is None or scheme not in _KINDS:
        raise FlashMoEError(
            f"{config['model_type']}, {scheme} is not written as GGUF here: only "
            f"{', '.join(_ARCHITECTURES)}, and {', '.join(_KINDS)}"
        )
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    _describe(writer, config)
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    for key, shape in _shapes(source).items():
        kind = _kind(key, shape, _KINDS[scheme])
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        size = math.prod(shape) // block * block_bytes
        gguf_name = names.get_name(key, try_suffixes=(".weight",))
        if gguf_name is None:
            raise FlashMoEError(f"GGUF has no name for {key}")
        writer.add_tensor_info(gguf_name, shape, np.dtype(np.float32), size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for key, tensor in _tensors(source):
        writer.write_tensor_data(_bytes(tensor, _kind(key, tuple(tensor.shape), _KINDS[scheme])))
    writer.close()
    with open(path, "rb") as file:
        drop_page_cache(file.fileno())


def _describe(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    _add_byte_vocabulary(writer, config["vocab_size"])


def _add_byte_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """A token for each byte, so that a server can talk; a prompt can name the others: <|1000|>.

    GPT-2's way of naming bytes: printable ones stand for themselves, others for 256 and on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    names = {byte: chr(byte) for byte in printable}
    names |= {byte: chr(256 + number) for number, byte in enumerate(others)}
    tokens = [names[byte] for byte in range(256)][:size]
    tokens += [f"<|{number}|>" for number in range(len(tokens), size)]
    normal, named = gguf.TokenType.NORMAL, gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([normal if number < 256 else named for number in range(size)])
    writer.add_token_merges([f"{names[101]} {names[32]}"])  # llama.cpp wants at least one
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(size - 1)
    writer.add_add_bos_token(False)


def _shapes(source: RandomWeights) -> dict[str, tuple[int, ...]]:
    """Of every tensor, in the order of `_tensors`."""
    expert_names = moe_modules.expert_parameter_names(source.model)
    state = source.model.state_dict()
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items() if key not in expert_names}
    for module_name, module in source.experts.items():
        parameters = moe_modules.expert_parameters(module)
        count, twice, width = parameters["gate_up_proj"].shape
        for part in ("gate_proj", "up_proj"):
            shapes[f"{module_name}.{part}.weight"] = (count, twice // 2, width)
        shapes[f"{module_name}.down_proj.weight"] = tuple(parameters["down_proj"].shape)
    return shapes


def _tensors(source: RandomWeights) -> Iterator[tuple[str, torch.Tensor]]:
    """Everything but the experts, then every layer's gate, up and down, experts side by side."""
    yield from source.dense()
    for module_name, module in source.experts.items():
        experts = [source.expert(module_name, e) for e in range(moe_modules.n_experts(module))]
        both = torch.stack([expert["gate_up_proj"] for expert in experts])
        half = both.shape[1] // 2
        yield f"{module_name}.gate_proj.weight", both[:, :half]
        yield f"{module_name}.up_proj.weight", both[:, half:]
        del both
        down = torch.stack([expert["down_proj"] for expert in experts])
        yield f"{module_name}.down_proj.weight", down


def _kind(key: str, shape: tuple[int, ...], of_experts: Kind) -> Kind:
    if ".experts." in key:
        return of_experts
    return Kind.F32 if len(shape) == 1 or key.endswith(".gate.weight") else Kind.BF16


def _bytes(tensor: torch.Tensor, kind: Kind) -> np.ndarray:
    if kind == Kind.BF16:
        return tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    values = tensor.float().contiguous().numpy()
    return values if kind == Kind.F32 else np.asarray(gguf.quants.quantize(values, kind))
