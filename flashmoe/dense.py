"""Fills a model with everything of a store but its experts."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open

from flashmoe import experts, skeleton
from flashmoe.errors import FlashMoEError
from flashmoe.store.direct_io import drop_page_cache
from flashmoe.store.manifest import Manifest


def fill(model: transformers.PreTrainedModel, store: Path, manifest: Manifest) -> None:
    """Weights and generation settings; its experts modules then ask their `flashmoe_experts`.

    The weights come into anonymous memory (pread, not a mapping), aligned as torch's own
    allocator does, and leave no page cache.
    Raises FlashMoEError when the store's dense file is damaged or of another model.
    """
    name = manifest.dense_file
    try:
        with safe_open(store / name, framework="pt", backend="pread") as file:
            tensors = {key: _aligned(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118
        with open(store / name, "rb") as read:
            drop_page_cache(read.fileno())
    except (SafetensorError, OSError) as error:
        raise FlashMoEError(f"store {store}: {name} is damaged ({error}); pack it again") from None
    try:
        model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        raise FlashMoEError(f"store {store}: {name} does not fit the model ({error})") from None
    model.tie_weights()
    # as `from_pretrained` leaves it: torch.nn.functional.linear takes another path for a weight
    # without a gradient, which differs in the last bit
    model.requires_grad_(True)
    held = skeleton.expert_parameter_names(model)
    for key, parameter in model.named_parameters():
        if parameter.is_meta and key not in held:
            raise FlashMoEError(f"store {store}: {name} lacks {key}; pack it again")
    model.set_experts_implementation(experts.NAME)
    if (store / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(store)


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same at an address of torch's alignment, 64 bytes.

    On AMD processors the last bit of a matrix product depends on where the weights lie: plain
    transformers differs there from itself, by up to 3e-6, when its mapped weights are copied.
    """
    return tensor.clone() if tensor.data_ptr() % 64 else tensor
