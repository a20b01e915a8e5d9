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

from flashmoe.engines.transformers.model import fast_linear, moe_modules, packed_linear
from flashmoe.engines.transformers.model.streamed_parameter import StreamedParameter
from flashmoe.errors import FlashMoEError

logger = logging.getLogger(__name__)


def fill(
    model: transformers.PreTrainedModel,
    tensors: Iterable[tuple[str, torch.Tensor]],
    path: Path,
    remedy: str,
    device: torch.device | str = "cpu",
    *,
    fast: bool = False,
) -> None:
    """Give `model` its weights, buffers and generation settings, but for the experts.

    model: fresh from `empty_model.build`; its experts' parameters become placeholders.
    tensors: everything that belongs to no expert, by the model's own names.
    path: the directory that they are from. remedy: what to do when some are missing, for messages.
    fast: as for `loading.load`'s arithmetic.
    transformers ties weights, casts them and initialises what no checkpoint holds (such as rotary
    frequencies) as in `from_pretrained`.
    Raises FlashMoEError when a weight does not fit, or is missing, where transformers would draw
    it at random. A persistent buffer that is missing gets its family's default, with a warning.
    """
    _load(model, dict(tensors), path, remedy, torch.device(device))
    if fast:
        fast_linear.hasten_all(model)
    else:
        packed_linear.pack_all(model)
    _take_generation_settings(model, path)


def check_complete(
    model: transformers.PreTrainedModel,
    tensors: Iterable[tuple[str, torch.Tensor]],
    path: Path,
    remedy: str,
) -> None:
    """Raise FlashMoEError where `fill` would, were `tensors` not on the meta device.

    model: fresh from `empty_model.build`, and of no use afterwards.
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
        info, _ = model._load_pretrained_model(model, tensors, None, config)
        info.missing_keys -= experts
        if info.mismatched_keys:
            name, shape, expected = min(info.mismatched_keys)
            raise FlashMoEError(
                f"{path}: {name} has shape {list(shape)} on disk, the model wants "
                f"{list(expected)}; config.json and weights do not match"
            )
        _refuse_missing(model, info.missing_keys, path, remedy)
        model._finalize_model_loading(model, config, info)


def _refuse_missing(
    model: transformers.PreTrainedModel, missing: set[str], path: Path, remedy: str
) -> None:
    """Raise FlashMoEError for a parameter that transformers would draw at random, before it does.

    It draws none that is tied to one on disk, and gives buffers their family's default.
    """
    ties, buffers = model.all_tied_weights_keys, {name for name, _ in model.named_buffers()}
    present = set(model.state_dict()) - missing
    for name in sorted(missing):
        source = ties.get(name, name)
        if name in buffers:
            logger.warning(
                "%s lacks the buffer %s: the model goes on with its default, as in transformers, "
                "which may not be what it was trained with",
                path,
                name,
            )
        elif not present & {source, *(tied for tied, other in ties.items() if other == source)}:
            raise FlashMoEError(f"{path} lacks the tensor {name}; {remedy}")


def _put_placeholders(model: nn.Module, device: torch.device) -> set[str]:
    """Replace the experts' parameters by placeholders; returns their full names."""
    names = moe_modules.expert_parameter_names(model)
    for module, name in names.values():
        parameter = StreamedParameter(model.get_parameter(f"{module}.{name}"), device)
        parameter._is_hf_initialized = True  # so that transformers draws no values for it
        model.get_submodule(module).register_parameter(name, parameter)
    return set(names)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()


def _take_generation_settings(model: transformers.PreTrainedModel, path: Path) -> None:
    if not model.can_generate() or not (path / "generation_config.json").exists():
        return
    try:
        model.generation_config = transformers.GenerationConfig.from_pretrained(path)
    except Exception as error:  # such as broken JSON, or settings that contradict each other
        raise FlashMoEError(
            f"{path / 'generation_config.json'} cannot be used ({error}): mend or remove it"
        ) from None
