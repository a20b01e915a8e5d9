"""Fills a model with everything but its experts."""

from __future__ import annotations

import torch
import transformers

from flashmoe import experts, skeleton
from flashmoe.backends import Backend
from flashmoe.errors import FlashMoEError
from flashmoe.packed_linear import Packer


def fill(
    model: transformers.PreTrainedModel,
    backend: Backend,
    device: torch.device | str = "cpu",
) -> None:
    """Weights and generation settings; its experts modules then ask their `flashmoe_experts`.

    Raises FlashMoEError when they are damaged or of another model.
    """
    path = backend.path
    packer = Packer(model)
    for name, tensor in backend.dense():
        owner, _, leaf = name.rpartition(".")
        try:
            module = model.get_submodule(owner)
        except AttributeError:  # such as a layer that this class of model does not have
            continue
        try:
            module.load_state_dict({leaf: tensor.to(device)}, strict=False, assign=True)
        except RuntimeError as error:
            raise FlashMoEError(
                f"{path}: the weights of {owner} do not fit the model ({error})"
            ) from None
        del tensor
        packer.pack(owner)
    for module in model.modules():  # such as rotary frequencies, which are in no checkpoint
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    model.tie_weights()
    # as `from_pretrained` leaves it: torch.nn.functional.linear takes another path for a weight
    # without a gradient, which differs in the last bit
    model.requires_grad_(True)
    held = skeleton.expert_parameter_names(model)
    for key, parameter in model.named_parameters():
        if parameter.is_meta and key not in held:
            raise FlashMoEError(f"{path} lacks the tensor {key}; {backend.remedy}")
    model.set_experts_implementation(experts.NAME)
    if (path / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(path)
