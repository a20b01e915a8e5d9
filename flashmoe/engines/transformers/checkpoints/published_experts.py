"""Finds the format in which a checkpoint's experts were published, and their weights' parts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from flashmoe import quant
from flashmoe.disk.shards import TensorEntry
from flashmoe.engines.transformers.checkpoints.expert_tensors import ExpertTensors, TensorRow
from flashmoe.quant import Published
from flashmoe.quant.published import piece_name

Rows = dict[str, TensorRow]


class PublishedExperts:
    """The weights that lie in one format. Others are stored as the model has them."""

    def __init__(
        self,
        format: Published,
        settings: Mapping[str, Any],
        tensors: ExpertTensors,
        entries: Mapping[str, TensorEntry],
        parameters: Iterable[str],
    ) -> None:
        """settings: config.json's `quantization_config`. entries: of all tensors on disk.

        parameters: the full names of experts' parameters.
        """
        self.format = format
        self._settings = settings
        self._tensors = tensors
        self._entries = entries
        self.kinds = {
            name: kinds for name in parameters if (kinds := self._kinds(self.rows(name, 0)))
        }  # of the first expert: all others' have the same shapes

    def rows(self, parameter: str, expert: int) -> Rows:
        """The tensors on disk of one expert's parameter, by part; none where it has no parts."""
        endings = {ending: part for part, ending in self.format.endings.items()}
        known = sorted([*endings, *self.format.unused], key=len, reverse=True)
        pieces: dict[str, Rows] = defaultdict(dict)
        for pattern, row in self._tensors.by_pattern_in_order(parameter, expert):
            ending = next((ending for ending in known if pattern.endswith(ending)), None)
            if ending is None:
                return {}
            if ending in endings:
                pieces[pattern.removesuffix(ending)][endings[ending]] = row
        if any(piece.keys() != self.format.endings.keys() for piece in pieces.values()):
            return {}
        return {
            piece_name(number, part): row
            for number, piece in enumerate(pieces.values())
            for part, row in piece.items()
        }

    def _kinds(self, rows: Rows) -> quant.published.Kinds:
        """dtype and shape of each part, where the format accepts every weight's; else none."""
        kinds = {
            part: (
                self._entries[row.name].dtype,
                self._entries[row.name].shape[row.row is not None :],
            )
            for part, row in rows.items()
        }
        pieces = quant.published.pieces(kinds)
        return kinds if all(self.format.accepts(piece, self._settings) for piece in pieces) else {}


def find(
    settings: Mapping[str, Any],
    tensors: ExpertTensors,
    entries: Mapping[str, TensorEntry],
    parameters: Iterable[str],
) -> PublishedExperts | None:
    """The experts' weights in the first format of such settings in which any of them lie.

    settings: config.json's `quantization_config`.
    """
    names = list(parameters)
    for kind in quant.formats().values():
        format = kind()
        if format.reads(settings):
            experts = PublishedExperts(format, settings, tensors, entries, names)
            if experts.kinds:
                return experts
    return None
