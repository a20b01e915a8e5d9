"""Finds the format in which a checkpoint's experts were published, and their weights' parts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from flashmoe import quant
from flashmoe.disk.shards import TensorEntry
from flashmoe.engines.transformers.checkpoints.expert_tensors import ExpertTensors, TensorRow
from flashmoe.quant import Published, part_name
from flashmoe.quant.published import Kinds, piece_name, pieces
from flashmoe.store.layout import ModelDescription

Rows = dict[str, TensorRow]


class PublishedExperts:
    """The weights that lie in one format. Others are stored as the model has them."""

    def __init__(
        self,
        format: Published,
        settings: Mapping[str, Any],
        tensors: ExpertTensors,
        entries: Mapping[str, TensorEntry],
        parameters: Mapping[str, tuple[int, ...]],
    ) -> None:
        """settings: config.json's `quantization_config`. entries: of all tensors on disk.

        parameters: of the experts, by full name, the shapes [out, in] or [in, out] that a model
        has.
        """
        self.format = format
        self._settings = settings
        self._tensors = tensors
        self._entries = entries
        self.kinds = {
            name: kinds
            for name, shape in parameters.items()
            if tensors.alike(name) and (kinds := self._kinds(self.rows(name, 0), shape))
        }  # of the first expert: all others' have the same shapes and dtypes

    def described(self, model: ModelDescription) -> ModelDescription:
        """A model's description, with the parts in place of the weights that they stand for."""
        layers = []
        for layer in model.layers:
            parameters: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
            for name, kind in layer.parameters.items():
                if parts := self.kinds.get(f"{layer.module}.{name}"):
                    parameters |= {part_name(name, part): kind for part, kind in parts.items()}
                else:
                    parameters[name] = kind
            layers.append(replace(layer, parameters=parameters))
        return replace(model, layers=tuple(layers), quantisation=self.format.name)

    def rows(self, parameter: str, expert: int) -> Rows:
        """The tensors on disk of one expert's parameter, by part; none where it has no parts."""
        endings = {ending: part for part, ending in self.format.endings.items()}
        known = sorted([*endings, *self.format.unused], key=len, reverse=True)
        weights: dict[str, Rows] = defaultdict(dict)
        for pattern, row in self._tensors.by_pattern_in_order(parameter, expert):
            ending = next((ending for ending in known if pattern.endswith(ending)), None)
            if ending is None:
                return {}
            if ending in endings:
                weights[pattern.removesuffix(ending)][endings[ending]] = row
        if any(piece.keys() != self.format.endings.keys() for piece in weights.values()):
            return {}
        return {
            piece_name(number, part): row
            for number, piece in enumerate(weights.values())
            for part, row in piece.items()
        }

    def _kinds(self, rows: Rows, shape: tuple[int, ...]) -> Kinds:
        """dtype and shape of each part, where the format holds such a parameter; else none."""
        kinds = {
            part: (
                self._entries[row.name].dtype,
                self._entries[row.name].shape[row.row is not None :],
            )
            for part, row in rows.items()
        }
        if not kinds or not self.format.fits(kinds):
            return {}
        if not all(self.format.accepts(piece, self._settings) for piece in pieces(kinds)):
            return {}
        held = self.format.shape({part: shape for part, (_, shape) in kinds.items()})
        return kinds if held in (shape, shape[::-1]) else {}


def find(
    settings: Mapping[str, Any],
    tensors: ExpertTensors,
    entries: Mapping[str, TensorEntry],
    parameters: Mapping[str, tuple[int, ...]],
) -> PublishedExperts | None:
    """The experts' weights in the first format of such settings in which any of them lie.

    settings: config.json's `quantization_config`.
    """
    for kind in quant.formats().values():
        format = kind()
        if format.reads(settings):
            experts = PublishedExperts(format, settings, tensors, entries, parameters)
            if experts.kinds:
                return experts
    return None
