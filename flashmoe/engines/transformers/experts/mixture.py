"""The weighted sum of a layer's experts, whose weights arrive one after the other.

Each expert's output is computed on its own and the outputs are added in ascending order of
expert, as transformers' `eager` does: results do not depend on which experts were resident, or
in which order the others arrived.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from flashmoe.cache.serving import LONG_CHOICES
from flashmoe.engines.transformers.experts.expert_arithmetic import weighted_output
from flashmoe.engines.transformers.experts.precision import Example, Precision, find_precision
from flashmoe.quant import Parameters

# The tokens that chose an expert [n], and for each the expert's position in top_k [n]. Of a lone
# token: None and a number, because indexing would take as long as the arithmetic.
Choices = tuple[torch.Tensor, torch.Tensor] | tuple[None, int]


class Mixture:
    """The weighted sum of experts' outputs for hidden [tokens, width].

    index [tokens, top_k] names the experts of each token, weights [tokens, top_k] their shares.
    `add` each expert that `index` names once, in any order and from any thread; then take the
    `total`. Beside the result it takes memory for one expert's arithmetic, and for each output
    that comes before its turn. Raises FlashMoEError when the module's own forward computes in a
    way that `find_precision` does not know.
    """

    def __init__(
        self,
        module: Any,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        precision: Precision | None = None,
    ) -> None:
        """module: the experts module. precision: default, that of its own forward."""
        self.module = module
        self.hidden = hidden
        self.weights = weights
        self.precision = precision or precision_of(module, hidden, weights)
        self._choices = _choices_by_expert(index)
        sums = torch.zeros_like(hidden, dtype=self.precision.sum_dtype)  # [tokens, width]
        self._sum = OrderedSum(sums, sorted(self._choices))

    def add_all(self, group: Iterable[tuple[int, Parameters]]) -> None:
        """As `add`, of several experts."""
        for expert, parameters in group:
            self.add(expert, parameters)

    def add(self, expert: int, parameters: Parameters) -> None:
        """Compute one expert and add its output; its parameters are needed until this returns."""
        tokens, positions = self._choices[expert]
        if tokens is None:
            x, share = self.hidden, self.weights[:, positions, None]
        else:
            x, share = self.hidden[tokens], self.weights[tokens, positions, None]
        output = weighted_output(self.module, parameters, x, share, self.precision)
        self._sum.add(expert, tokens, output)

    def total(self) -> torch.Tensor:
        """The sum [tokens, width] in the dtype of `hidden`, once every expert was added."""
        return self._sum.value.to(self.hidden.dtype)


def precision_of(module: nn.Module, hidden: torch.Tensor, weights: torch.Tensor) -> Precision:
    """In which dtypes `module` computes; raises what `Mixture` raises."""
    return find_precision(module, hidden, weights, _example_total)


def _example_total(
    example: Example,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    precision: Precision,
) -> torch.Tensor:
    mixture = Mixture(example, hidden, index, weights, precision)
    mixture.add_all((expert, dict(example.expert(expert))) for expert in index.unique().tolist())
    return mixture.total()


def most_waiting_bytes(model: PreTrainedModel) -> int:
    """The most bytes of outputs that wait for their turn in the sum: see `LONG_CHOICES`.

    They are counted at float32, the widest dtype of a sum.
    """
    return LONG_CHOICES * getattr(model.config.get_text_config(), "hidden_size", 0) * 4


def _choices_by_expert(index: torch.Tensor) -> dict[int, Choices]:
    """Who chose each expert, of index [tokens, top_k], in the order of transformers' `eager`.

    That is by position in top_k, then by token. The order of rows may decide the last bit of a
    matrix product.
    """
    tokens, top_k = index.shape
    if tokens == 1:
        row = {expert: position for position, expert in enumerate(index[0].tolist())}
        if len(row) == top_k:  # a token may choose an expert twice: deepseek_v4's hash routing
            return {expert: (None, position) for expert, position in row.items()}
    by_position = index.T.reshape(-1)  # [top_k * tokens]
    counts = torch.bincount(by_position).tolist()  # [experts]
    by_expert = torch.argsort(by_position, stable=True).split(counts)  # each [n], into by_position
    return {
        expert: (choices % tokens, choices // tokens)
        for expert, choices in enumerate(by_expert)
        if len(choices)
    }


class OrderedSum:
    """Adds experts' outputs in ascending order of expert; one that comes early waits its turn.

    value [tokens, width] is the sum once all of `experts` (ascending) were added. early: the
    outputs that wait, by expert. Several threads may add.
    """

    def __init__(self, value: torch.Tensor, experts: list[int]) -> None:
        self.value = value
        self._turns = experts[::-1]
        self.early: dict[int, tuple[torch.Tensor | None, torch.Tensor]] = {}
        self._lock = threading.Lock()

    def add(self, expert: int, tokens: torch.Tensor | None, output: torch.Tensor) -> None:
        """Add output [n, width] to the sums of these tokens [n] (None: of all) in its turn."""
        with self._lock:
            self.early[expert] = tokens, output
            while self._turns and self._turns[-1] in self.early:
                tokens, output = self.early.pop(self._turns.pop())
                if tokens is None:
                    self.value.add_(output)
                else:
                    self.value.index_add_(0, tokens, output)
