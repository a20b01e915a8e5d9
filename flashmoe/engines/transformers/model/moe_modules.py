"""Which modules of a transformers model are its experts, and what their shapes are."""

from __future__ import annotations

import transformers
from torch import nn

from flashmoe.errors import FlashMoEError
from flashmoe.store.layout import ExpertShapes, ModelDescription

_TOP_K_NAMES = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_top_k",
    "moe_topk",
    "moe_k",
    "top_k_experts",
    "experts_per_token",
    "top_k",
)


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose experts go through transformers' ExpertsInterface, by name, in order.

    They are told by the attributes that transformers' `use_experts_implementation` gives them.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "is_transposed") and hasattr(module, "_apply_gate")
    }


def n_experts(module: nn.Module) -> int:
    """The number of experts of one of the `expert_modules`."""
    return int(module.num_experts)  # type: ignore[arg-type]


def expert_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters [experts, ...] of one of the `expert_modules`, by their names in it."""
    count = n_experts(module)
    return {
        name: parameter
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 1 and parameter.shape[0] == count
    }


def expert_parameter_names(model: nn.Module) -> dict[str, tuple[str, str]]:
    """The full name of every experts' parameter -> (module's name, parameter's name in it)."""
    return {
        f"{module_name}.{name}": (module_name, name)
        for module_name, module in expert_modules(model).items()
        for name in expert_parameters(module)
    }


def top_k(config: transformers.PretrainedConfig) -> int:
    """Experts per token, under whichever name the family's configuration has for it.

    Raises FlashMoEError where it has none of the names in use.
    """
    text = config.get_text_config()
    for name in _TOP_K_NAMES:
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    raise FlashMoEError(
        f"the configuration of {text.model_type} does not say how many experts a token uses"
    )


def describe(
    model: transformers.PreTrainedModel, config: transformers.PretrainedConfig
) -> ModelDescription:
    """What a store records of `model`; config: all of its configuration.

    Raises FlashMoEError where the configuration does not say how many experts a token uses.
    """
    layers = [
        ExpertShapes(
            name,
            n_experts(module),
            bool(module.is_transposed),
            {n: (p.dtype, tuple(p.shape[1:])) for n, p in expert_parameters(module).items()},
        )
        for name, module in expert_modules(model).items()
    ]
    return ModelDescription(type(model).__name__, top_k(config), model.config.dtype, tuple(layers))
