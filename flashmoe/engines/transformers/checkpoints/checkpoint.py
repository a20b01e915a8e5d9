"""Reads a Hugging Face checkpoint tensor by tensor, in the form that the modules want.

transformers' own conversion mapping says how tensors on disk become parameters. It is applied
to one parameter, or to one expert of one parameter, at a time, so memory stays bounded by the
largest of those and never by a layer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator
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

from flashmoe.disk.shards import Place, Shard, TensorEntry
from flashmoe.engines.transformers.checkpoints import published_quantisation, weight_files
from flashmoe.engines.transformers.model import empty_model, moe_modules
from flashmoe.errors import FlashMoEError

REMEDY = "fetch the checkpoint again"


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
        self.config = empty_model.read_config(directory)
        self._shards: list[Shard] = []
        self._shard_of: dict[str, Shard] = {}
        try:
            for file in weight_files.find(directory, self.config):
                shard = Shard(file)
                self._shards.append(shard)
                self._shard_of.update(dict.fromkeys(shard.tensors, shard))
            self.dtype = weight_files.dtype_of(directory, self.config)
            self.model = empty_model.build(self.config, self.dtype)
            self.experts = moe_modules.expert_modules(self.model)
            if not self.experts:
                raise FlashMoEError(
                    f"{directory} ({type(self.model).__name__}) has no experts that transformers "
                    f"dispatches: FlashMoE streams Mixture-of-Experts models only"
                )
            self.description = moe_modules.describe(self.model, self.config)
            self.parameters = self.model.state_dict()
            self.expert_names = moe_modules.expert_parameter_names(self.model)
            self._recipes = self._plan()
            self._refuse_quantised()
            self._check_experts()
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

    def _plan(self) -> dict[str, _Recipe]:
        transforms = get_model_conversion_mapping(self.model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        prefix, parameters = self.model.base_model_prefix, self.parameters
        recipes: dict[str, _Recipe] = {}
        for key in sorted(self._shard_of, key=dot_natural_key):
            target, pattern = rename_source_key(key, renamings, converters, prefix, parameters)
            if target not in parameters and key in parameters:
                target, pattern = rename_source_key(key, [], [], prefix, parameters)
            if target in parameters:  # others are extras such as draft heads, unused by the model
                recipe = recipes.setdefault(target, _Recipe(by_pattern.get(pattern or "")))
                if recipe.converter is None and recipe.sources:
                    continue  # one tensor under two names: transformers takes the first
                recipe.sources.setdefault(pattern or key, []).append(key)
        return recipes

    def _refuse_quantised(self) -> None:
        tensors = {key: shard.tensors[key] for key, shard in self._shard_of.items()}
        used, floats = set(), set()
        for target, recipe in self._recipes.items():
            keys = {key for keys in recipe.sources.values() for key in keys}
            used |= keys
            if self.parameters[target].is_floating_point():
                floats |= keys
        published_quantisation.refuse(self.directory, tensors, used, floats)

    def _check_experts(self) -> None:
        """Raises FlashMoEError unless every expert has its tensors, all of one shape."""
        for full, (module, _) in self.expert_names.items():
            count = moe_modules.n_experts(self.experts[module])
            if full not in self._recipes:
                raise FlashMoEError(f"{self.directory}: no tensors for the experts' {full}")
            recipe = self._recipes[full]
            if recipe.converter and not recipe.sources.keys() <= set(
                recipe.converter.source_patterns
            ):
                raise FlashMoEError(
                    f"{self.directory} has the experts' {full} twice, each alone and all "
                    f"as one tensor; {REMEDY}"
                )
            for keys in recipe.sources.values():
                entries = [self._entry(key) for key in keys]
                if not self._fused(keys, count) and len(keys) != count:
                    raise FlashMoEError(
                        f"{self.directory} has {len(keys)} tensors such as {keys[0]} for the "
                        f"{count} experts of {module}: experts are missing, or config.json is "
                        "another model's"
                    )
                if odd := [
                    k for k, e in zip(keys, entries, strict=True) if e.shape != entries[0].shape
                ]:
                    raise FlashMoEError(
                        f"{self.directory}: {odd[0]} has shape {list(self._entry(odd[0]).shape)}, "
                        f"{keys[0]} has {list(entries[0].shape)}: they do not match"
                    )

    def _entry(self, key: str) -> TensorEntry:
        return self._shard_of[key].tensors[key]

    def dense(self, *, meta: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter and buffer on disk that belongs to no expert, one at a time.

        meta: on the meta device, nothing is read.
        """
        for target, recipe in self._recipes.items():
            if target not in self.expert_names:
                sources = {
                    pattern: [self._source(target, key, meta=meta) for key in keys]
                    for pattern, keys in recipe.sources.items()
                }
                for name, tensor in self._convert(target, recipe, sources).items():
                    if name in self.parameters:
                        self._check_shape(name, tensor, tuple(self.parameters[name].shape))
                        yield name, tensor.to(self.parameters[name].dtype)

    def expert(self, module_name: str, expert: int) -> dict[str, torch.Tensor]:
        """All parameters of one expert, without the expert dimension, contiguous."""
        return self._expert(module_name, expert, self._source)

    def _expert(
        self, module_name: str, expert: int, source: Callable[..., torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """source(target, key, row): the tensor on disk, or what stands for it."""
        result = {}
        for full, (module, _) in self.expert_names.items():
            if module != module_name:
                continue
            tensors = self._tensors_of(full, expert)
            sources = {pattern: [source(full, *tensor)] for pattern, tensor in tensors.items()}
            for name, tensor in self._convert(full, self._recipes[full], sources).items():
                parameter = self.parameters[name]
                self._check_shape(name, tensor, (1, *parameter.shape[1:]))
                result[self.expert_names[name][1]] = tensor.to(parameter.dtype)[0].contiguous()
        return result

    def stored_as_used(self, module_name: str) -> dict[str, bool]:
        """By parameter: do its bytes on disk, one tensor after the other, make it, unconverted?

        Tried with a pattern in place of an expert's weights, which may be alike by chance: whatever
        transformers does beside putting tensors side by side (turning, interleaving, casting them)
        shows.
        """
        patterns: dict[tuple[str, int | None], torch.Tensor] = {}

        def pattern(target: str, key: str, row: int | None) -> torch.Tensor:
            shape, dtype = self._entry(key).shape, self._entry(key).dtype
            shape = shape if row is None else (1, *shape[1:])
            words = -(-math.prod(shape) * dtype.itemsize // 4)
            made = torch.arange(len(patterns), len(patterns) + words, dtype=torch.int32) * 2654435
            made = made.view(torch.uint8)[: math.prod(shape) * dtype.itemsize]
            patterns[key, row] = made
            return made.view(dtype).view(shape).to(self.parameters[target].dtype)

        found = {}
        for name, made in self._expert(module_name, 0, pattern).items():
            full = f"{module_name}.{name}"
            keys = [key for keys in self._recipes[full].sources.values() for key in keys]
            given = torch.cat([patterns[place] for place in self._in_order(full, 0)])
            alike = {self._entry(key).dtype for key in keys} == {made.dtype}
            found[name] = alike and torch.equal(given, made.view(-1).view(torch.uint8))
        return found

    def places(self, module_name: str, name: str, expert: int) -> list[Place]:
        """Where the tensors lie that one parameter of one expert is made of, in order."""
        tensors = self._in_order(f"{module_name}.{name}", expert)
        return [self._shard_of[key].place(key, row) for key, row in tensors]

    def _in_order(self, full: str, expert: int) -> list[tuple[str, int | None]]:
        """The tensors of `_tensors_of`, as the converter puts them together."""
        converter, tensors = self._recipes[full].converter, self._tensors_of(full, expert)
        order = converter.source_patterns if converter else tensors
        return [tensors[pattern] for pattern in order if pattern in tensors]

    def _tensors_of(self, full: str, expert: int) -> dict[str, tuple[str, int | None]]:
        """By source pattern, the tensor on disk that holds one expert, and its row there.

        No row: the tensor is that expert's alone.
        """
        count = moe_modules.n_experts(self.experts[self.expert_names[full][0]])
        return {
            pattern: (keys[0], expert) if self._fused(keys, count) else (keys[expert], None)
            for pattern, keys in self._recipes[full].sources.items()
        }

    def _fused(self, keys: list[str], count: int) -> bool:
        """Is it one tensor of all experts?"""
        return len(keys) == 1 and self._entry(keys[0]).shape[:1] == (count,)

    def dense_bytes(self) -> int:
        """Bytes of what `dense` yields, in the model's dtypes."""
        dense = (p for name, p in self.parameters.items() if name not in self.expert_names)
        return sum(parameter.numel() * parameter.element_size() for parameter in dense)

    def forget_pages(self) -> None:
        """Let the kernel drop the shards' pages, so that a pack does not fill the page cache."""
        for shard in self._shards:
            shard.forget_pages()

    def _source(
        self, target: str, key: str, row: int | None = None, *, meta: bool = False
    ) -> torch.Tensor:
        """A tensor on disk, cast as transformers does before it converts it."""
        if meta:
            entry = self._entry(key)
            tensor = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        else:
            tensor = self._shard_of[key].read(key, row)
        return tensor.to(self.parameters[target].dtype)

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
        try:
            made = converter.convert(target, model=one_expert, config=self.config)
        except Exception as error:  # tensors that do not fit each other fail in each their own way
            raise FlashMoEError(
                f"{self.directory}: {target} cannot be made of the tensors on disk ({error}); "
                "config.json and weights do not match"
            ) from None
        return {k: v[0] if isinstance(v, list) else v for k, v in made.items()}

    def _check_shape(self, name: str, tensor: torch.Tensor, wanted: tuple[int, ...]) -> None:
        if tuple(tensor.shape) != wanted:
            raise FlashMoEError(
                f"{self.directory}: {name} has shape {list(tensor.shape)} on disk, "
                f"the model wants {list(wanted)}; config.json and weights do not match"
            )
