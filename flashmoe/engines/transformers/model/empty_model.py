"""A transformers model with its structure and no weights."""

from __future__ import annotations

import importlib
import importlib.util
import json
from contextlib import ExitStack
from pathlib import Path

import torch
import transformers
from transformers.core_model_loading import build_glob_alternation
from transformers.modeling_utils import _get_dtype
from transformers.monkey_patching import patch_output_recorders

from flashmoe.errors import FlashMoEError


def read_config(directory: Path) -> transformers.PretrainedConfig:
    """The configuration of the model in `directory`; no code of the checkpoint is run.

    Raises FlashMoEError when it is missing, or transformers does not know its kind.
    """
    path = directory / "config.json"
    try:
        if not isinstance(json.loads(path.read_text()), dict):
            raise ValueError("it is no JSON object")
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (FileNotFoundError, NotADirectoryError):
        raise FlashMoEError(
            f"{directory} holds no config.json: give a Hugging Face model directory or a store"
        ) from None
    except Exception as error:  # transformers raises many kinds for a config it cannot use
        raise FlashMoEError(
            f"{path} is not a configuration that transformers {transformers.__version__} knows "
            f"({_first_line(error)})"
        ) from None
    return config


def build(
    config: transformers.PretrainedConfig, dtype: torch.dtype | None = None
) -> transformers.PreTrainedModel:
    """The model that `config` names, all of it on the meta device, as `from_pretrained` begins.

    dtype: in which it computes; default: what `config` says, else float32. Parameters and
        persistent buffers have it, but for those that the family keeps in float32.
    Raises FlashMoEError when transformers has no such model, or cannot make it.
    """
    model_class, config = _model_class(config)
    for part in (config, config.get_text_config()):  # as a dequantised model's
        vars(part).pop("quantization_config", None)
    # transformers' own function, because it writes the dtype into the sub-configurations too
    config, dtype = _get_dtype(
        dtype or config.dtype or torch.float32, None, config, None, None, True
    )
    try:
        with ExitStack() as contexts:
            for context in model_class.get_init_context(dtype, False, False, False):
                contexts.enter_context(context)
            model = model_class(config)
            patch_output_recorders(model)
    except Exception as error:  # each family checks its settings in its own way, or not at all
        raise FlashMoEError(
            f"config.json makes no {model_class.__name__} ({_first_line(error)}): "
            "it is damaged, or of another model"
        ) from None
    if plan := model._get_dtype_plan(dtype):
        pattern, glob_of_group, _ = build_glob_alternation(list(plan))
        for name, tensor in model.state_dict(keep_vars=True).items():
            if match := pattern.search(name):
                tensor.data = tensor.data.to(plan[glob_of_group[str(match.lastgroup)]])
    return model.eval()


def _model_class(config: transformers.PretrainedConfig):  # type: ignore[no-untyped-def]
    """The class that config.json names, and the (part of the) configuration that it takes."""
    if not config.architectures:
        mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        if type(config) not in mapping:
            raise FlashMoEError(
                f"config.json names no architecture, and transformers has no causal language model "
                f'for {config.model_type}: add "architectures" to it'
            )
        model_class = mapping[type(config)]
    else:
        model_class = _named_class(config, config.architectures[0])
    config_class = model_class.config_class
    for part in (config, config.get_text_config()):
        if isinstance(part, config_class):
            return model_class, part
    raise FlashMoEError(
        f"config.json names the architecture {model_class.__name__}, which takes a "
        f"{config_class.model_type!r} configuration, but is one of {config.model_type!r}"
    )


def _named_class(config: transformers.PretrainedConfig, name: object):  # type: ignore[no-untyped-def]
    """transformers' model class of that name, public or of the configuration's own family."""
    family = type(config).__module__.replace(".configuration_", ".modeling_")
    modules = [transformers, *([importlib.import_module(family)] if _is_importable(family) else [])]
    for module in modules:
        candidate = getattr(module, str(name), None)
        if isinstance(candidate, type) and issubclass(candidate, transformers.PreTrainedModel):
            return candidate
    raise FlashMoEError(
        f"config.json names the architecture {name!r}, which transformers "
        f"{transformers.__version__} does not have: code of a checkpoint's own is not run"
    )


def _is_importable(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[0]
