"""Refuses checkpoints that were published quantised: the tensors tell, not config.json."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from flashmoe.disk.shards import TensorEntry
from flashmoe.errors import FlashMoEError
from flashmoe.store.manifest import dtype_name

_SETTINGS = ("quantization_config", "compression_config")
_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_MASK_OR_POSITION = (torch.bool, torch.int64)
_SCALE = re.compile(r"_(scale|scales|scale_inv|scale_2|zero_point|global_scale|absmax)$")


def refuse(
    directory: Path,
    tensors: Mapping[str, TensorEntry],
    used: Collection[str],
    floats: Collection[str],
) -> None:
    """Raise FlashMoEError where weights are quantised, or where only config.json says so.

    tensors: all that is in the files. used: the names of those that the model takes. floats: of
    these, the ones that it computes with as floating point.
    """
    quantised = sorted(_quantised_tensors(tensors, used, floats))
    claims = dict(_claims(json.loads((directory / "config.json").read_text()), "config.json"))
    method = ", ".join(dict.fromkeys(claims.values()))
    if quantised:
        name = quantised[0]
        raise FlashMoEError(
            f"{directory} is already quantised ({method or 'its config.json does not say how'}; "
            f"{name.rpartition('.')[0] or name} holds {dtype_name(tensors[name].dtype)}), which "
            "FlashMoE cannot stream yet: use the checkpoint's float16, bfloat16 or float32 version"
        )
    if claims:
        where = next(iter(claims))
        kinds = {dtype_name(tensors[name].dtype) for name in floats}
        raise FlashMoEError(
            f"{directory}: {where} says that the weights are quantised ({method}), but they are "
            f"{' and '.join(sorted(kinds))}: remove that entry from config.json"
        )


def _quantised_tensors(
    tensors: Mapping[str, TensorEntry], used: Collection[str], floats: Collection[str]
) -> Iterator[str]:
    """The names of tensors that only a quantised checkpoint has."""
    for name, entry in tensors.items():
        if name in used:
            if name in floats and entry.dtype not in _PLAIN:
                yield name
        elif len(entry.shape) > 1 and entry.dtype not in _PLAIN:
            if entry.dtype not in _MASK_OR_POSITION:
                yield name
        elif _SCALE.sub("", name) in used and _SCALE.search(name):
            yield name


def _claims(settings: Any, where: str) -> Iterator[tuple[str, str]]:
    """Where config.json says that weights are quantised, and how; sub-configurations included."""
    if not isinstance(settings, dict):
        return
    for key, value in settings.items():
        if key in _SETTINGS:
            if value is not None:
                method = value.get("quant_method") if isinstance(value, dict) else None
                yield f"{where}'s {key}", str(method or "unknown")
        elif isinstance(value, dict):
            yield from _claims(value, f"{where}'s {key}")
