"""Reads a Hugging Face checkpoint tensor by tensor, in the form that the modules want.

transformers' own conversion mapping says how tensors on disk become parameters. It is applied
to one parameter, or to one expert of one parameter, at a time, so memory stays bounded by the
largest of those and never by a layer.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from flashmoe import skeleton
from flashmoe.errors import FlashMoEError
from flashmoe.shards import Place, Shard

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"


@dataclass
class _Recipe:
    """How one parameter (or several made together) comes from tensors on disk."""

    converter: WeightConverter | None
    sources: dict[str, list[str]] = field(default_factory=dict)  # by source pattern, in order


class _OneExpert:
    """A model as conversions must see it that look at its shapes: with one expert a layer."""

    def __init__(self, model: nn.Module, expert_names: Collection[str]) -> None:
        self.model = model
        self.expert_names = expert_names

    def get_parameter(self, name: str) -> torch.Tensor:
        parameter = self.model.get_parameter(name)
        return parameter[:1] if name in self.expert_names else parameter

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


class Checkpoint:
    """An open checkpoint directory. Use as a context manager.

    Raises FlashMoEError when it is not an MoE checkpoint that transformers can route through
    its ExpertsInterface, or a shard is missing or cut short.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = skeleton.read_config(directory)
        self.model = skeleton.build(self.config)
        self.experts = skeleton.expert_modules(self.model)
        if not self.experts:
            raise FlashMoEError(
                f"{directory} ({self.config.model_type}) has no experts that transformers "
                f"dispatches: FlashMoE streams Mixture-of-Experts models only"
            )
        self.parameters = self.model.state_dict()
        self.expert_names = skeleton.expert_parameter_names(self.model)
        self._shards: list[Shard] = []
        self._shard_of: dict[str, Shard] = {}
        try:
            self._open_shards()
            self._recipes = self._plan()
            for name in self.expert_names:
                if name not in self._recipes:
                    raise FlashMoEError(f"{directory}: no tensors for the experts' {name}")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for shard in self._shards:
            shard.close()

    def _open_shards(self) -> None:
        index = self.directory / INDEX_NAME
        if index.exists():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
                raise FlashMoEError(f"{index} is not a shard index ({error!r})") from None
        else:
            names = [SINGLE_NAME]
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
                raise FlashMoEError(f"{index} names a shard outside the directory ({name!r})")
            shard = Shard(self.directory / name)
            self._shards.append(shard)
            self._shard_of.update(dict.fromkeys(shard.tensors, shard))

    def _plan(self) -> dict[str, _Recipe]:
        transforms = get_model_conversion_mapping(self.model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        prefix, known = self.model.base_model_prefix, self.parameters
        recipes: dict[str, _Recipe] = {}
        for key in sorted(self._shard_of, key=dot_natural_key):
            target, pattern = rename_source_key(key, renamings, converters, prefix, known)
            if target not in known and key in known:
                target, pattern = rename_source_key(key, [], [], prefix, known)
            if target in known:  # others are extras such as draft heads, unused by the model
                recipe = recipes.setdefault(target, _Recipe(by_pattern.get(pattern or "")))
                recipe.sources.setdefault(pattern or key, []).append(key)
        return recipes

    def dense(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter and buffer on disk that belongs to no expert, one at a time."""
        for target, recipe in self._recipes.items():
            if target not in self.expert_names:
                sources = {p: [self._read(k) for k in keys] for p, keys in recipe.sources.items()}
                for name, tensor in self._convert(target, recipe, sources).items():
                    yield name, self._cast(name, tensor)

    def expert(self, module_name: str, expert: int) -> dict[str, torch.Tensor]:
        """All parameters of one expert, without the expert dimension, contiguous."""
        result = {}
        for full, (module, _) in self.expert_names.items():
            if module != module_name:
                continue
            tensors = self._tensors_of(full, expert)
            sources = {pattern: [self._read(*tensor)] for pattern, tensor in tensors.items()}
            for name, tensor in self._convert(full, self._recipes[full], sources).items():
                result[self.expert_names[name][1]] = self._cast(name, tensor)[0].contiguous()
        return result

    def places(self, module_name: str, name: str, expert: int) -> list[Place]:
        """Where the tensors lie that one parameter of one expert is made of, in order."""
        full = f"{module_name}.{name}"
        converter, tensors = self._recipes[full].converter, self._tensors_of(full, expert)
        order = converter.source_patterns if converter else tensors
        chosen = [tensors[pattern] for pattern in order if pattern in tensors]
        return [self._shard_of[key].place(key, row) for key, row in chosen]

    def _tensors_of(self, full: str, expert: int) -> dict[str, tuple[str, int | None]]:
        """By source pattern, the tensor on disk that holds one expert, and its row there.

        No row: the tensor is that expert's alone.
        """
        count = skeleton.n_experts(self.experts[self.expert_names[full][0]])
        return {
            pattern: (keys[expert], None) if len(keys) == count > 1 else (keys[0], expert)
            for pattern, keys in self._recipes[full].sources.items()
        }

    def bytes_at(self, place: Place) -> torch.Tensor:
        """What lies there, uint8, through the page cache."""
        (shard,) = (shard for shard in self._shards if shard.path == place.file)
        return shard.bytes_at(place)

    def dense_bytes(self) -> int:
        """Bytes of what `dense` yields, in the model's dtypes."""
        dense = (p for name, p in self.parameters.items() if name not in self.expert_names)
        return sum(parameter.numel() * parameter.element_size() for parameter in dense)

    def forget_pages(self) -> None:
        """Let the kernel drop the shards' pages, so that a pack does not fill the page cache."""
        for shard in self._shards:
            shard.forget_pages()

    def _read(self, key: str, row: int | None = None) -> torch.Tensor:
        return self._shard_of[key].read(key, row)

    def _convert(
        self, target: str, recipe: _Recipe, sources: dict[str, list[torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        if recipe.converter is None:
            ((tensor,),) = sources.values()
            return {target: tensor}
        converter = copy.deepcopy(recipe.converter)
        for pattern, tensors in sources.items():
            converter.collected_tensors[pattern] = list(tensors)
        one_expert = _OneExpert(self.model, self.expert_names.keys())
        made = converter.convert(target, model=one_expert, config=self.config)
        return {k: v[0] if isinstance(v, list) else v for k, v in made.items()}

    def _cast(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        wanted = self.parameters[name]
        expected = (1, *wanted.shape[1:]) if name in self.expert_names else tuple(wanted.shape)
        if tuple(tensor.shape) != expected:
            raise FlashMoEError(
                f"{self.directory}: {name} has shape {list(tensor.shape)} on disk, "
                f"the model wants {list(expected)}; config.json and weights do not match"
            )
        return tensor.to(wanted.dtype)
