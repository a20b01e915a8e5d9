"""How tensors on disk become a model's parameters: by transformers' own conversion mapping.

It is applied to one parameter, or to one expert of one parameter, at a time, so memory stays
bounded by the largest of those and never by a layer.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.quantizers import HfQuantizer

from flashmoe.engines.transformers.model import moe_modules
from flashmoe.errors import FlashMoEError


@dataclass
class Recipe:
    """Which tensors on disk one parameter (or several made together) comes from, and how."""

    converter: WeightConverter | None  # None: the one tensor is the parameter
    sources: dict[str, list[str]] = field(default_factory=dict)  # names by source pattern, in order

    @property
    def tensor_names(self) -> list[str]:
        return [name for names in self.sources.values() for name in names]

    @property
    def patterns(self) -> list[str]:
        """The source patterns in the order in which their tensors are put together."""
        order = self.converter.source_patterns if self.converter else self.sources
        return [pattern for pattern in order if pattern in self.sources]


class Conversion:
    """The recipes of a checkpoint's parameters, and their use.

    recipes: by the full name of the parameter, or of the first of several made together.
    Tensors of which the model makes nothing, such as draft heads, are in no recipe.
    """

    def __init__(
        self,
        directory: Path,
        config: transformers.PretrainedConfig,
        model: transformers.PreTrainedModel,
        tensor_names: Iterable[str],
        dequantiser: HfQuantizer | None = None,
    ) -> None:
        """directory: for error messages. config: all of it; model: its empty model.

        dequantiser: turns what was published quantised into what the model has.
        """
        self.directory = directory
        self.recipes = _find_recipes(model, tensor_names, dequantiser)
        self._dequantiser = dequantiser
        self._config = config
        self._model = _OneExpertModel(model, moe_modules.expert_parameter_names(model))

    def cast(self, target: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A tensor on disk as `convert` wants it; dtype: of the recipe's parameter."""
        if self._dequantiser is not None:
            converter = self.recipes[target].converter
            dtype = self._dequantiser.get_new_dtype(converter, tensor, dtype) or tensor.dtype
        return tensor.to(dtype)

    def convert(
        self, target: str, tensors: Mapping[str, list[torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """The parameters that the recipe of `target` makes, by full name.

        tensors: by source pattern, as `Recipe.sources` has their names, each as `cast`
            gives it. Of an expert's parameter: those of one expert, the result being [1, ...].
        Raises FlashMoEError where the tensors do not fit each other.
        """
        recipe = self.recipes[target]
        if recipe.converter is None:
            ((tensor,),) = tensors.values()
            return {target: tensor}
        converter = copy.deepcopy(recipe.converter)  # because it keeps what it collects
        for pattern, collected in tensors.items():
            converter.collected_tensors[pattern] = list(collected)
        try:
            parameters = converter.convert(target, model=self._model, config=self._config)
        except Exception as error:  # every conversion fails in its own way
            raise FlashMoEError(
                f"{self.directory}: {target} cannot be made of the tensors on disk ({error}); "
                "config.json and weights do not match"
            ) from None
        return {k: v[0] if isinstance(v, list) else v for k, v in parameters.items()}


class _OneExpertModel:
    """A model with one expert a layer, for conversions that look at the model's shapes."""

    def __init__(self, model: nn.Module, expert_parameter_names: Collection[str]) -> None:
        self.model = model
        self.expert_parameter_names = expert_parameter_names

    def get_parameter(self, name: str) -> torch.Tensor:
        parameter = self.model.get_parameter(name)
        return parameter[:1] if name in self.expert_parameter_names else parameter

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def _find_recipes(
    model: transformers.PreTrainedModel,
    tensor_names: Iterable[str],
    dequantiser: HfQuantizer | None,
) -> dict[str, Recipe]:
    transforms = get_model_conversion_mapping(model, hf_quantizer=dequantiser)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix, parameters = model.base_model_prefix, model.state_dict()
    recipes: dict[str, Recipe] = {}
    for name in sorted(tensor_names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, parameters)
        if target not in parameters and name in parameters:
            target, pattern = rename_source_key(name, [], [], prefix, parameters)
        if target in parameters:
            recipe = recipes.setdefault(target, Recipe(by_pattern.get(pattern or "")))
            if recipe.converter is None and recipe.sources:
                continue  # one tensor under two names: transformers takes the first
            recipe.sources.setdefault(pattern or name, []).append(name)
    return recipes
