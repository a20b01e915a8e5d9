"""Writes a source of weights as a Hugging Face directory, as OLMoE's and Qwen3-MoE's are.

It has one shard a layer, which AirLLM links to where it would split others first.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

import flashmoe
from flashmoe.disk.shards import header
from flashmoe.engines.transformers.checkpoints.random_weights import RandomWeights
from flashmoe.engines.transformers.model import moe_modules
from flashmoe.errors import FlashMoEError

FAMILIES = ("olmoe", "qwen3_moe")  # whose experts have three matrices each on the hub


def write(source: RandomWeights, path: Path) -> None:
    """In bf16, a shard a layer; memory is bounded by a layer without its experts.

    Raises FlashMoEError for other families.
    """
    if source.config.model_type not in FAMILIES:
        raise FlashMoEError(f"{source.config.model_type} is not laid out as {FAMILIES[0]} is")
    path.mkdir()
    groups = itertools.groupby(source.dense(), key=lambda pair: _owner(pair[0]))
    weight_map: dict[str, str] = {}
    last = len(source.experts) + 3  # embeddings, layers, norm, head
    for number, (owner, dense) in enumerate(groups, start=1):
        file_name = f"model-{number:05}-of-{last:05}.safetensors"
        dense_tensors = dict(dense)
        shapes = {
            name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in dense_tensors.items()
        }
        outline = _experts(source, owner, partial(_outline, source))
        shapes |= {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in outline}
        weight_map |= dict.fromkeys(shapes, file_name)
        with open(path / file_name, "wb") as file:
            file.write(header(shapes))
            for _, tensor in itertools.chain(
                dense_tensors.items(), _experts(source, owner, source.expert)
            ):
                file.write(tensor.contiguous().view(torch.uint8).numpy().data)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    source.config.save_pretrained(path)
    shutil.copy(flashmoe.demo_path() / "tokenizer.json", path)  # it asks for one; never used
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def _owner(key: str) -> str:
    """The module that AirLLM loads at once: `model.layers.3`, or the whole of another."""
    parts = key.split(".")
    return ".".join(parts[:3]) if parts[:2] == ["model", "layers"] else key.rpartition(".")[0]


def _experts(
    source: RandomWeights, owner: str, tensors_of: Callable[[str, int], dict[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a layer's experts, by their names on the hub."""
    for module_name, module in source.experts.items():
        if not module_name.startswith(f"{owner}."):
            continue
        for expert in range(moe_modules.n_experts(module)):
            tensors = tensors_of(module_name, expert)
            gate, up = tensors["gate_up_proj"].chunk(2)
            for part, tensor in zip(
                ("gate_proj", "up_proj", "down_proj"), (gate, up, tensors["down_proj"]), strict=True
            ):
                yield f"{module_name}.{expert}.{part}.weight", tensor


def _outline(source: RandomWeights, module_name: str, expert: int) -> dict[str, torch.Tensor]:
    """As `source.expert`, on the meta device: shapes without drawing gigabytes for them."""
    parameters = moe_modules.expert_parameters(source.experts[module_name])
    return {name: parameter[expert] for name, parameter in parameters.items()}
