"""How a model's experts lie in a store: every layer's extents, one after the other."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from flashmoe import quant
from flashmoe.quant import NONE, Quantiser
from flashmoe.store.manifest import LayerSpec, dtype_name, lay_out


@dataclass(frozen=True)
class ExpertShapes:
    """One MoE layer as its model has it."""

    module: str  # full name
    n_experts: int
    transposed: bool  # weights are [in, out], not [out, in]
    parameters: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # of one expert, by name


@dataclass(frozen=True)
class ModelDescription:
    """What a store records of the model that its experts belong to."""

    architecture: str
    top_k: int
    dtype: torch.dtype  # in which the model computes
    layers: tuple[ExpertShapes, ...]
    quantisation: str = NONE  # the format of the experts' weights, whose parts the layers have


def lay_out_layers(model: ModelDescription, scheme: Quantiser | None) -> list[LayerSpec]:
    """Every layer's extents, without checksums; scheme: None stores weights as they are.

    Raises FlashMoEError for a dtype or a shape that cannot be stored so.
    """
    specs: list[LayerSpec] = []
    for layer in model.layers:
        blank_expert = {
            name: torch.empty(shape, dtype=dtype)
            for name, (dtype, shape) in layer.parameters.items()
        }
        stored = stored_tensors(blank_expert, scheme, transposed=layer.transposed)
        tensors = [(n, dtype_name(t.dtype), tuple(t.shape)) for n, t in stored.items()]
        offset_bytes = specs[-1].end_bytes if specs else 0
        scheme_name = scheme.name if scheme else model.quantisation
        specs.append(lay_out(layer.module, layer.n_experts, offset_bytes, tensors, scheme_name))
    return specs


def stored_tensors(
    parameters: Mapping[str, torch.Tensor], scheme: Quantiser | None, *, transposed: bool
) -> dict[str, torch.Tensor]:
    """An expert's parameters as a store has them: weights in the scheme's parts, biases as is.

    parameters: by name. A weight is [out, in], or [in, out] if `transposed`; the scheme gets it
    as [out, in]. The parts of a weight are named by `quant.part_name`. Raises FlashMoEError for
    a shape that the scheme does not take.
    """
    if scheme is None:
        return dict(parameters)
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in parameters.items():
        if tensor.dim() == 2:
            parts = scheme.parts(tensor.T if transposed else tensor)
            stored |= {quant.part_name(name, part): values for part, values in parts.items()}
        else:
            stored[name] = tensor
    return stored


def config_digest(directory: Path) -> str:
    """sha256 of the directory's config.json in hex digits; of no bytes where it has none."""
    path = directory / "config.json"
    return hashlib.sha256(path.read_bytes() if path.is_file() else b"").hexdigest()
