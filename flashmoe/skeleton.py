"""A transformers model with structure and buffers but no weights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from torch import nn

from flashmoe.errors import FlashMoEError

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


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters made within are moved to the meta device at once; buffers stay real."""
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.detach().to("meta"), requires_grad=False)
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def read_config(directory: Path) -> transformers.PretrainedConfig:
    """The model's configuration; no code of the checkpoint is run.

    Raises FlashMoEError when it is missing, unknown to transformers, or already quantised.
    """
    try:
        plain = json.loads((directory / "config.json").read_text())
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except FileNotFoundError:
        raise FlashMoEError(
            f"{directory} holds no config.json: give a Hugging Face model directory or a store"
        ) from None
    except Exception as error:  # transformers raises many kinds for a config it cannot use
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise FlashMoEError(
            f"{directory / 'config.json'} is not a configuration that transformers "
            f"{transformers.__version__} knows ({first_line})"
        ) from None
    if "quantization_config" in plain:
        method = plain["quantization_config"].get("quant_method", "unknown")
        raise FlashMoEError(
            f"{directory} is already quantised ({method}), which FlashMoE cannot stream yet: "
            "use the checkpoint's float16, bfloat16 or float32 version"
        )
    return config


def build(config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    """The model of `config` in its own dtype, parameters on the meta device, in eval mode.

    The dtype of each parameter is the one that `from_pretrained` would give it, including
    the families' own float32 exceptions.
    """
    dtype = config.dtype or torch.float32
    with _parameters_on_meta():
        mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        if type(config) in mapping:
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        else:
            architecture = (config.architectures or ["?"])[0]
            model_class = getattr(transformers, architecture, None)
            if model_class is None:
                raise FlashMoEError(f"transformers has no model class {architecture!r}")
            model = model_class._from_config(config, dtype=dtype)
    for pattern, kept in model._get_dtype_plan(dtype).items():
        for name, parameter in list(model.named_parameters()):
            if re.search(pattern, name):
                parameter.data = parameter.data.to(kept)
    model.requires_grad_(False)
    return model.eval()


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose experts go through transformers' ExpertsInterface, by name, in order.

    `use_experts_implementation` gives each the attributes looked for here.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "is_transposed") and hasattr(module, "_apply_gate")
    }


def n_experts(module: nn.Module) -> int:
    """Experts of one module that `expert_modules` found."""
    return int(module.num_experts)  # type: ignore[arg-type]


def expert_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters whose first dimension is the expert."""
    count = n_experts(module)
    return {
        name: parameter
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 1 and parameter.shape[0] == count
    }


def expert_parameter_names(model: nn.Module) -> dict[str, tuple[str, str]]:
    """Full name of every parameter of experts -> (module's name, parameter's name)."""
    return {
        f"{module_name}.{name}": (module_name, name)
        for module_name, module in expert_modules(model).items()
        for name in expert_parameters(module)
    }


def top_k(config: transformers.PretrainedConfig) -> int:
    """Experts per token, under whichever name the family's configuration has for it."""
    text = config.get_text_config()
    for name in _TOP_K_NAMES:
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    raise FlashMoEError(
        f"the configuration of {text.model_type} does not say how many experts a token uses"
    )
