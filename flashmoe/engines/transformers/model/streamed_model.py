"""Refuses what libraries cannot do to a model whose experts stay on the SSD."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NoReturn

import torch
import transformers
from torch import nn

from flashmoe.engines.transformers.model import moe_modules
from flashmoe.engines.transformers.model.streamed_parameter import StreamedParameter
from flashmoe.errors import FlashMoEError

Change = Callable[[torch.Tensor], torch.Tensor]  # such as a move to a device, or a cast


def protect(model: transformers.PreTrainedModel) -> None:
    """From now on `model` refuses moves, casts and saving that would need its experts' values.

    They raise FlashMoEError before anything is done. That holds for the model and for every part
    of it with experts in it. What changes nothing, and saving an adapter, goes on.
    """
    for name in moe_modules.expert_modules(model):
        experts = model.get_submodule(name)
        experts._apply = partial(_apply_to_rest, experts)  # type: ignore[method-assign]
        while name:
            name = name.rpartition(".")[0]
            parent = model.get_submodule(name)
            parent._apply = partial(_apply_if_harmless, parent)  # type: ignore[method-assign]
    model.save_pretrained = partial(_save_pretrained, model)  # type: ignore[method-assign]
    model.push_to_hub = partial(_push_to_hub, model)  # type: ignore[method-assign]


def _apply_if_harmless(module: nn.Module, change: Change, recurse: bool = True) -> nn.Module:
    """`nn.Module._apply`, which `.to()`, `.half()`, `.cuda()` and their like all call."""
    for tensor in {(t.device, t.dtype): t for t in _tensors_in_memory(module)}.values():
        probe = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        try:
            result = change(probe)
            where = f"to {result.dtype} on {result.device}"
            same = (result.device, result.dtype) == (probe.device, probe.dtype)
        except Exception as error:  # such as a device that is not there
            where, same = f"there ({error})", False
        if not same:
            raise FlashMoEError(
                f"this model cannot go from {probe.dtype} on {probe.device} {where}: its experts "
                "stay on the SSD as they are. Load it as it is to be: flashmoe.load(..., "
                "device=...), from a checkpoint of that dtype"
            )
    return type(module)._apply(module, change, recurse)


def _tensors_in_memory(module: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters and buffers that a change would reach; packed layers are left packed."""
    for part in module.modules():
        # not by `part._parameters`, which would unpack a PackedLinear
        for tensors in (part.__dict__.get("_parameters") or {}, part._buffers):
            for tensor in tensors.values():
                if tensor is not None and not isinstance(tensor, StreamedParameter):
                    yield tensor


def _apply_to_rest(module: nn.Module, change: Change, recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` to all of an experts module but its streamed parameters."""
    streamed = {n: p for n, p in module._parameters.items() if isinstance(p, StreamedParameter)}
    for name in streamed:
        module._parameters[name] = None
    try:
        return type(module)._apply(module, change, recurse)
    finally:
        module._parameters.update(streamed)


def _save_pretrained(
    model: transformers.PreTrainedModel, save_directory: Any, *arguments: Any, **named: Any
) -> None:
    """Saves an adapter as transformers does; refuses to save the model."""
    if not getattr(model, "_hf_peft_config_loaded", False):
        _refuse_saving(model)
    type(model).save_pretrained(model, save_directory, *arguments, **named)


def _push_to_hub(model: transformers.PreTrainedModel, *arguments: Any, **named: Any) -> Any:
    if not getattr(model, "_hf_peft_config_loaded", False):
        _refuse_saving(model)
    return type(model).push_to_hub(model, *arguments, **named)


def _refuse_saving(model: transformers.PreTrainedModel) -> NoReturn:
    raise FlashMoEError(
        f"this model is not saved, since its experts are on the SSD and not in it: copy "
        f"{model.name_or_path} in place of that. An adapter is saved by the PeftModel around it; a "
        "model that was trained further, by transformers"
    )
