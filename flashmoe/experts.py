"""Runs a layer's experts from the cache; transformers calls it in place of the module's forward.

Registered with transformers' ExpertsInterface, so any family that dispatches its experts
there works without model code of ours. Each expert's output is computed on its own and the
outputs are added in ascending order of expert, as transformers' `eager` does: results do not
depend on which experts were resident, or in which order the others arrived.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from flashmoe.arena import Arena
from flashmoe.cache import ExpertCache
from flashmoe.errors import FlashMoEError
from flashmoe.events import LAYERS_BELOW, Event, below
from flashmoe.store.reader import ExtentReader

NAME = "flashmoe"


@dataclass
class Timings:
    """Where the time inside the experts went, in seconds, since the last reset."""

    total_seconds: float = 0.0  # in the experts' forward altogether
    wait_seconds: float = 0.0  # blocked on reads
    compute_seconds: float = 0.0  # expert arithmetic


class Routing:
    """What each layer chose for the tokens at hand, which policies of higher layers look at."""

    def __init__(self, top_k: int, n_layers: int) -> None:
        self.chosen = [np.empty((0, top_k), np.int64)] * n_layers

    def note(self, layer: int, rows: np.ndarray, n_experts: int) -> np.ndarray:
        """Take in `rows` [tokens, top_k] of `layer`; what lies below them, as `events.below`."""
        self.chosen[layer] = rows
        lowest = layer
        while lowest > max(0, layer - LAYERS_BELOW) and len(self.chosen[lowest - 1]) == len(rows):
            lowest -= 1  # an encoder's layers, below a decoder's, are of other tokens
        seen = np.stack(self.chosen[lowest : layer + 1], axis=1)
        return below(seen, layer - lowest, n_experts)


class StreamedExperts:
    """One layer's experts: the cache decides, the reader fills the arena, the module computes."""

    def __init__(
        self,
        number: int,
        arena: Arena,
        cache: ExpertCache,
        reader: ExtentReader,
        timings: Timings,
        routing: Routing,
    ) -> None:
        self.number = number
        self.arena = arena
        self.cache = cache
        self.reader = reader
        self.timings = timings
        self.routing = routing

    def forward(
        self, module: nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden [tokens, width], index and weights [tokens, top_k] -> [tokens, width]."""
        started = time.perf_counter()
        rows = index.numpy()
        known = self.routing.note(self.number, rows, self.cache.policy.n_keys)
        shares = weights.detach().float().numpy()
        event = Event.of_rows(rows, 0, shares, known)
        if len(rows) == 1:
            result = self._one_token(module, hidden, rows[0].tolist(), weights, event)
        else:
            result = self._many_tokens(module, hidden, index, weights, event)
        self.timings.total_seconds += time.perf_counter() - started
        return result

    def _one_token(
        self,
        module: nn.Module,
        hidden: torch.Tensor,
        row: list[int],
        weights: torch.Tensor,
        event: Event,
    ) -> torch.Tensor:
        outputs: dict[int, torch.Tensor] = {}

        def compute(expert: int, parameters: dict[str, torch.Tensor]) -> None:
            output = expert_output(module, parameters, hidden)
            outputs[expert] = (output * weights[:, row.index(expert), None]).to(hidden.dtype)

        self._serve(event, compute)
        total = torch.zeros_like(hidden)
        for expert in sorted(outputs):
            total += outputs[expert]
        return total

    def _many_tokens(
        self,
        module: nn.Module,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        event: Event,
    ) -> torch.Tensor:
        tokens, top_k = index.shape
        outputs = hidden.new_empty(tokens, top_k, hidden.shape[-1])
        # eager gathers an expert's tokens by position in top_k, then by token: so do we, since
        # the order of rows may decide the last bit of a matrix product
        by_position = index.T.reshape(-1)
        order = torch.argsort(by_position, stable=True)
        ends = torch.bincount(by_position).cumsum(0).tolist()

        def compute(expert: int, parameters: dict[str, torch.Tensor]) -> None:
            mine = order[ends[expert - 1] if expert else 0 : ends[expert]]
            token, position = mine % tokens, mine // tokens
            output = expert_output(module, parameters, hidden[token])
            output = output * weights[token, position, None]
            outputs[token, position] = output.to(hidden.dtype)

        self._serve(event, compute)
        ascending = index.argsort(dim=1)
        outputs = outputs.gather(1, ascending[..., None].expand_as(outputs))
        total = torch.zeros_like(hidden)
        for position in range(top_k):
            total += outputs[:, position]
        return total

    def _serve(self, event: Event, compute: Callable[[int, dict[str, torch.Tensor]], None]) -> None:
        """Compute every member of `event`: resident ones first, while the others are read."""
        clock, timings = time.perf_counter, self.timings
        for wave in self.cache.waves(event):
            pending = dict(wave.loads)
            reads: list[Future[None]] = []
            try:
                loads = [(key, self.arena.slots[slot]) for key, slot in wave.loads]
                reads = self.reader.submit(self.number, loads)
                started = clock()
                for key, slot in wave.hits:
                    compute(key, self.arena.parameters[slot])
                timings.compute_seconds += clock() - started
                for (key, slot), read in zip(wave.loads, reads, strict=True):
                    started = clock()
                    read.result()
                    arrived = clock()
                    del pending[key]
                    compute(key, self.arena.parameters[slot])
                    timings.wait_seconds += arrived - started
                    timings.compute_seconds += clock() - arrived
            except BaseException:  # a failed read, or Ctrl-C: nothing half-read stays resident
                wait(reads)
                for key in pending:
                    self.cache.forget(key)
                raise


def expert_output(
    module: nn.Module, parameters: dict[str, torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    """One expert on x [n, width], by the contract of transformers' `batched_mm` experts."""
    gated, name = module.has_gate, "gate_up_proj" if module.has_gate else "up_proj"
    hidden = _linear(module, parameters, name, x)
    hidden = module._apply_gate(hidden) if gated else module.act_fn(hidden)  # type: ignore[operator]
    hidden = _linear(module, parameters, "down_proj", hidden)
    if module.has_post_expert_norm:
        hidden = module.post_expert_norm(hidden)  # type: ignore[operator]
    return hidden


def _linear(
    module: nn.Module, parameters: dict[str, torch.Tensor], name: str, x: torch.Tensor
) -> torch.Tensor:
    bias = parameters[f"{name}_bias"] if module.has_bias else None
    if not module.is_transposed:
        return F.linear(x, parameters[name], bias)
    out = x @ parameters[name]
    return out if bias is None else out + bias


def _forward(
    self: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    streamed: StreamedExperts | None = getattr(self, "flashmoe_experts", None)
    if streamed is None:
        raise FlashMoEError("this model's FlashMoE engine was closed: load the model again")
    return streamed.forward(self, hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(NAME, _forward)
