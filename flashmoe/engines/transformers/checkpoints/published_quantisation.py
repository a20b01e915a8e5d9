"""Whether a checkpoint was published quantised: the tensors tell; and how: config.json tells."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.quantizers import AutoHfQuantizer, AutoQuantizationConfig, HfQuantizer
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from flashmoe import quant
from flashmoe.disk.shards import TensorEntry
from flashmoe.engines.transformers.checkpoints import ragged_blocks
from flashmoe.engines.transformers.checkpoints.own_dequantiser import OwnDequantiser
from flashmoe.errors import FlashMoEError
from flashmoe.store.manifest import dtype_name

_SETTINGS = ("quantization_config", "compression_config")
_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_MASK_OR_POSITION = (torch.bool, torch.int64)
_ORDER = ".weight_g_idx"
_FACTOR = re.compile(r"[._](scale|scales|scale_inv|qscale_weight)$")
_REMEDY = "use the checkpoint's float16, bfloat16 or float32 version"
_SCALE = re.compile(r"_(scale|scales|scale_inv|scale_2|zero_point|global_scale|absmax)$")


def dequantiser(
    directory: Path, config: PretrainedConfig, tensors: Mapping[str, TensorEntry]
) -> HfQuantizer | None:
    """What loads weights that are quantised, if config.json says so: transformers' own, or ours.

    It turns them into those of a plain model. tensors: all that is in the files.
    Raises FlashMoEError where it cannot, and where the weights are plain all the same.
    """
    claims = dict(_claims(json.loads((directory / "config.json").read_text()), "config.json"))
    if not claims:
        return None
    method = ", ".join(dict.fromkeys(claims.values()))
    if all(_is_plain(name, entry) for name, entry in tensors.items()):
        where = next(iter(claims))
        kinds = sorted({dtype_name(e.dtype) for e in tensors.values() if e.dtype in _PLAIN})
        raise FlashMoEError(
            f"{directory}: {where} says that the weights are quantised ({method}), but they are "
            f"{' and '.join(kinds)}: remove that entry from config.json"
        )
    settings = settings_of(config)
    for kind in quant.formats().values():
        if kind.has_own_loader and kind.reads(settings):
            return OwnDequantiser(kind())
    try:
        if (settings.get("transform_config") or {}).get("config_groups"):
            raise ValueError("transformers would leave its transforms out")
        quantizer = AutoHfQuantizer.from_config(
            AutoQuantizationConfig.from_dict(settings | {"dequantize": True}), pre_quantized=True
        )
        quantizer.validate_environment()
        if "dequantize" not in quantizer.get_load_operations():
            raise ValueError("transformers makes no plain weights of them")
        if isinstance(quantizer, FineGrainedFP8HfQuantizer):
            ragged_blocks.allow(quantizer)
    except Exception as error:  # each method checks its settings in its own way
        raise FlashMoEError(
            f"{directory} is already quantised ({method}), which cannot be loaded here "
            f"({str(error).strip() or repr(error)}): {_REMEDY}"
        ) from None
    return quantizer


def refuse_unsaid(
    directory: Path,
    tensors: Mapping[str, TensorEntry],
    used: Collection[str],
    floats: Collection[str],
) -> None:
    """Raise FlashMoEError where weights are quantised of which config.json says nothing.

    tensors: all that is in the files. used: the names of those that the model takes. floats: of
    these, the ones that it computes with as floating point.
    """
    if quantised := sorted(_quantised_tensors(tensors, used, floats)):
        name = quantised[0]
        raise FlashMoEError(
            f"{directory} is already quantised (its config.json does not say how; "
            f"{name.rpartition('.')[0] or name} holds {dtype_name(tensors[name].dtype)}): {_REMEDY}"
        )


def refuse_incomplete(
    directory: Path, tensors: Mapping[str, TensorEntry], recipes: Iterable[Sequence[str]]
) -> None:
    """Raise FlashMoEError where transformers would leave a scale or an order of columns out.

    recipes: the tensors of each parameter that is computed with as floating point.
    """
    used: set[str] = set()
    for names in recipes:
        used.update(names)
        scaled = {name.rpartition(".")[0] for name in names if _FACTOR.search(name)}
        for name in names:
            if tensors[name].dtype not in _PLAIN and name.rpartition(".")[0] not in scaled:
                raise FlashMoEError(
                    f"{directory}: {name} holds {dtype_name(tensors[name].dtype)} with no scales "
                    f"beside it that transformers would use: {_REMEDY}"
                )
    for name in tensors.keys() - used:
        owner = _SCALE.sub("", name)
        if name.endswith(_ORDER) or (owner != name and owner in used):
            raise FlashMoEError(
                f"{directory}: transformers would ignore {name}, without which the numbers are "
                f"others: {_REMEDY}"
            )


def settings_of(config: PretrainedConfig) -> dict[str, Any]:
    """config.json's `quantization_config`; empty where it has none."""
    for part in (config, config.get_text_config()):
        for key in _SETTINGS:
            if isinstance(settings := getattr(part, key, None), dict):
                return settings
    return {}


def _is_plain(name: str, entry: TensorEntry) -> bool:
    return entry.dtype in (*_PLAIN, *_MASK_OR_POSITION) and not _SCALE.search(name)


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
