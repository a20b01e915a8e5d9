"""Fills a model with everything but its experts, as transformers' own loader would."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from flashmoe.engines.transformers.model import moe_modules, packed_linear
from flashmoe.engines.transformers.model.streamed_parameter import StreamedParameter
from flashmoe.errors import FlashMoEError

logger = logging.getLogger(__name__)


def fill(
    model: transformers.PreTrainedModel,
    tensors: Iterable[tuple[str, torch.Tensor]],
    path: Path,
    remedy: str,
    device: torch.device | str = "cpu",
) -> None:
    """Weights, buffers and generation settings; its experts' parameters become placeholders.

    model: fresh from `empty_model.build`. tensors: by the model's own names. path: where they are
    from; remedy: what to do when it lacks some. transformers ties weights, casts them and
    initialises what no checkpoint holds (such as rotary frequencies) as in `from_pretrained`.
    Raises FlashMoEError when a weight is missing, where transformers would draw it at random, or
    does not fit. A persistent buffer that is missing gets its family's default, with a warning.
    """
    _load(model, dict(tensors), path, remedy, torch.device(device))
    packed_linear.pack_all(model)
    _take_generation_settings(model, path)


def check_complete(
    model: transformers.PreTrainedModel,
    tensors: Iterable[tuple[str, torch.Tensor]],
    path: Path,
    remedy: str,
) -> None:
    """Raise FlashMoEError where `tensors`, on the meta device, would not fill `model`.

    model: fresh from `empty_model.build`; it is used up.
    """
    _load(model, dict(tensors), path, remedy, torch.device("meta"))


def _load(
    model: transformers.PreTrainedModel,
    tensors: dict[str, torch.Tensor],
    path: Path,
    remedy: str,
    device: torch.device,
) -> None:
    experts = _put_placeholders(model, device)
    dtype = model.config.dtype
    config = LoadStateDictConfig(
        pretrained_model_name_or_path=str(path),
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        device_map=None if device.type == "cpu" else {"": device},
        weight_mapping=[],  # the tensors have the model's own names
    )
    with _no_progress_bar():
        found, _ = model._load_pretrained_model(model, tensors, None, config)
        found.missing_keys -= experts
        if found.mismatched_keys:
            name, given, wanted = min(found.mismatched_keys)
            raise FlashMoEError(
                f"{path}: {name} has shape {list(given)} on disk, the model wants {list(wanted)}; "
                "config.json and weights do not match"
            )
        _refuse_missing(model, found.missing_keys, path, remedy)
        model._finalize_model_loading(model, config, found)


def _refuse_missing(
    model: transformers.PreTrainedModel, missing: set[str], path: Path, remedy: str
) -> None:
    """Raise FlashMoEError for a parameter that transformers would draw at random, before it does.

    Weights that are tied to one that is there are none, and buffers get their family's default.
    """
    ties, buffers = model.all_tied_weights_keys, {name for name, _ in model.named_buffers()}
    there = set(model.state_dict()) - missing
    for name in sorted(missing):
        source = ties.get(name, name)
        if name in buffers:
            logger.warning(
                "%s lacks the buffer %s: the model goes on with its default, as in transformers, "
                "which may not be what it was trained with",
                path,
                name,
            )
        elif not there & {source, *(tied for tied, other in ties.items() if other == source)}:
            raise FlashMoEError(f"{path} lacks the tensor {name}; {remedy}")


def _put_placeholders(model: nn.Module, device: torch.device) -> set[str]:
    """In place of the experts' parameters, whose full names are returned."""
    names = moe_modules.expert_parameter_names(model)
    for module, name in names.values():
        parameter = StreamedParameter(model.get_parameter(f"{module}.{name}"), device)
        parameter._is_hf_initialized = True  # for transformers: no values are to be drawn
        model.get_submodule(module).register_parameter(name, parameter)
    return set(names)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _take_generation_settings(model: transformers.PreTrainedModel, path: Path) -> None:
    if not model.can_generate() or not (path / "generation_config.json").exists():
        return
    try:
        model.generation_config = transformers.GenerationConfig.from_pretrained(path)
    except Exception as error:  # JSON that is none, or settings that contradict each other
        raise FlashMoEError(
            f"{path / 'generation_config.json'} cannot be used ({error}): mend or remove it"
        ) from None
