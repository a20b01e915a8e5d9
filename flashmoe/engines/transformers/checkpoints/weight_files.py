"""Which files hold a checkpoint's weights, and in which dtype it computes: as transformers decides.

The functions that `from_pretrained` itself calls decide here too, so that a stale index, a second
copy or a missing dtype cannot lead to other weights than transformers would load.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.distributed.checkpoint import is_sharded_checkpoint
from transformers.modeling_utils import _get_dtype, _get_resolved_checkpoint_files
from transformers.quantizers import HfQuantizer

from flashmoe.disk.files import is_inside
from flashmoe.errors import FlashMoEError

INDEX_NAME, ADAPTER_NAME = "model.safetensors.index.json", "adapter_config.json"
REMEDY = "fetch the checkpoint again"  # in messages about tensors that are missing or damaged
_WEIGHT_KINDS = ("*.safetensors", "*.bin", "*.pth", "*.pt", "*.gguf")


def find(directory: Path, config: PretrainedConfig) -> list[Path]:
    """The safetensors files that `from_pretrained(directory)` would read, in its order.

    Raises FlashMoEError when it would read others, or none.
    """
    if (directory / ADAPTER_NAME).is_file():
        raise FlashMoEError(
            f"{directory} holds an adapter ({ADAPTER_NAME}), which transformers would put on "
            "another model: load the model without it, then the adapter by `model.load_adapter`"
        )
    if is_sharded_checkpoint(str(directory)):
        raise FlashMoEError(
            f"{directory} holds a distributed checkpoint (shard-*.safetensors), which FlashMoE "
            "cannot stream: save the model with `save_pretrained`"
        )
    files, _ = _resolved(directory, config)
    kinds = {file.suffix for file in files}
    if kinds != {".safetensors"}:
        raise FlashMoEError(
            f"{directory} holds its weights in {files[0].name}, of which FlashMoE reads nothing: "
            "load the model with transformers and save it with `save_pretrained`, as safetensors"
        )
    return files


def dtype_of(
    directory: Path, config: PretrainedConfig, dequantiser: HfQuantizer | None = None
) -> torch.dtype:
    """The dtype that `from_pretrained` would give the model; written into `config` as well.

    dequantiser: of a checkpoint that was published quantised.
    Raises FlashMoEError when config.json names none that torch knows.
    """
    metadata = None
    files: list[Path] = []
    if config.dtype is None:
        files, metadata = _resolved(directory, config)
    try:
        _, dtype = _get_dtype(
            "auto", [str(f) for f in files], config, metadata, None, True, dequantiser
        )
        if not dtype.is_floating_point:
            raise ValueError(f"{dtype} is no floating point")
    except Exception as error:
        raise FlashMoEError(
            f"{directory / 'config.json'}: its dtype cannot be used ({error}): "
            "write float32, bfloat16 or float16 there"
        ) from None
    return dtype


def _resolved(
    directory: Path, config: PretrainedConfig
) -> tuple[list[Path], dict[str, Any] | None]:
    """The weight files that transformers finds, and their metadata.

    Raises FlashMoEError where there are none, or the index names files outside the directory.
    """
    _check_index(directory / (getattr(config, "transformers_weights", None) or INDEX_NAME))
    try:
        names, metadata = _get_resolved_checkpoint_files(
            directory,
            variant=None,
            gguf_file=None,
            use_safetensors=None,
            user_agent=None,
            is_remote_code=False,
            transformers_explicit_filename=getattr(config, "transformers_weights", None),
        )
    except OSError:
        raise FlashMoEError(
            f"{directory} has no weights to load: {_what_is_there(directory)}"
        ) from None
    except Exception as error:  # an index that anybody wrote fails in many ways
        raise FlashMoEError(f"{directory / INDEX_NAME} is not a shard index ({error!r})") from None
    extra = [directory / name for name in type(config).extra_files if (directory / name).is_file()]
    return list(dict.fromkeys([*map(Path, names or []), *extra])), metadata


def _check_index(index: Path) -> None:
    """Raises FlashMoEError for an index that names files outside its directory."""
    if not index.name.endswith(".json") or not index.is_file():
        return
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise FlashMoEError(f"{index} is not a shard index ({error!r})") from None
    for name in names:
        if not is_inside(name, subfolders=True):
            raise FlashMoEError(f"{index} names a shard outside the directory ({name!r})")


def _what_is_there(directory: Path) -> str:
    """The end of a sentence that says that no weights are: what is, and what to do."""
    names = sorted(file.name for kind in _WEIGHT_KINDS for file in directory.glob(kind))
    if not names:
        return "fetch model.safetensors, or the shards and their index"
    examples = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    if any(name.endswith(".safetensors") for name in names):
        return (
            f"there is {examples}, but neither model.safetensors nor {INDEX_NAME}: fetch that too"
        )
    return f"there is {examples}: FlashMoE reads safetensors"
