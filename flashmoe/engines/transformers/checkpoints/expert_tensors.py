"""Which tensors on disk hold one expert: tensors of its own, or rows of tensors of all experts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from flashmoe.disk.shards import TensorEntry
from flashmoe.engines.transformers.checkpoints.conversion import Recipe
from flashmoe.engines.transformers.checkpoints.weight_files import REMEDY
from flashmoe.errors import FlashMoEError


class TensorRow(NamedTuple):
    """A tensor on disk, or one row of it along the first dimension."""

    name: str
    row: int | None  # None: the whole tensor


class ExpertTensors:
    """The tensors of every expert of a checkpoint.

    Raises FlashMoEError unless every expert has its tensors, all of one shape.
    """

    def __init__(
        self,
        directory: Path,
        recipes: Mapping[str, Recipe],
        entries: Mapping[str, TensorEntry],
        n_experts: Mapping[str, int],
    ) -> None:
        """directory: for error messages. recipes: by parameter's full name.

        entries: of all tensors on disk, by name. n_experts: of the module to which a parameter
            belongs, by the parameter's full name; these are the experts' parameters.
        """
        self._recipes = recipes
        self._entries = entries
        self._n_experts = n_experts
        for parameter in n_experts:
            self._check(directory, parameter)

    def _check(self, directory: Path, parameter: str) -> None:
        """Raises FlashMoEError unless every expert has its tensors of a parameter."""
        count = self._n_experts[parameter]
        if parameter not in self._recipes:
            raise FlashMoEError(f"{directory}: no tensors for the experts' {parameter}")
        recipe = self._recipes[parameter]
        if len(recipe.patterns) < len(recipe.sources):
            raise FlashMoEError(
                f"{directory} has the experts' {parameter} twice, each alone and all "
                f"as one tensor; {REMEDY}"
            )
        for names in recipe.sources.values():
            shapes = {name: self._entries[name].shape for name in names}
            if not self._is_of_all(names, count) and len(names) != count:
                raise FlashMoEError(
                    f"{directory} has {len(names)} tensors such as {names[0]} for the "
                    f"{count} experts of {parameter.rpartition('.')[0]}: experts are missing, or "
                    "config.json is another model's"
                )
            for name, shape in shapes.items():
                if shape != shapes[names[0]]:
                    raise FlashMoEError(
                        f"{directory}: {name} has shape {list(shape)}, {names[0]} has "
                        f"{list(shapes[names[0]])}: they do not match"
                    )

    def alike(self, parameter: str) -> bool:
        """Do all experts have a parameter's tensors in the same dtypes?"""
        return all(
            len({self._entries[name].dtype for name in names}) == 1
            for names in self._recipes[parameter].sources.values()
        )

    def by_pattern(self, parameter: str, expert: int) -> dict[str, TensorRow]:
        """By source pattern, the tensor on disk that holds one expert's part of a parameter."""
        count = self._n_experts[parameter]
        return {
            pattern: TensorRow(names[0], expert)
            if self._is_of_all(names, count)
            else TensorRow(names[expert], None)
            for pattern, names in self._recipes[parameter].sources.items()
        }

    def by_pattern_in_order(self, parameter: str, expert: int) -> list[tuple[str, TensorRow]]:
        """Those of `by_pattern`, in the order in which the converter puts them together."""
        rows = self.by_pattern(parameter, expert)
        return [(pattern, rows[pattern]) for pattern in self._recipes[parameter].patterns]

    def _is_of_all(self, names: list[str], count: int) -> bool:
        """Is this one tensor of all experts?"""
        return len(names) == 1 and self._entries[names[0]].shape[:1] == (count,)
