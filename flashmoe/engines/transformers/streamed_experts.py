"""Runs a layer's experts from the cache, for any family that transformers dispatches."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from flashmoe.cache.expert_cache import LONG_CHOICES, ExpertCache, is_long
from flashmoe.engines.transformers import arithmetic, gradients
from flashmoe.events import LAYERS_BELOW, Event, below
from flashmoe.memory.arena import Arena
from flashmoe.reading.read_queue import Span
from flashmoe.reading.reader import ExtentReader
from flashmoe.residency.prefetch import Prefetcher

# Of a prompt the last tokens vote: a router's work on all of them costs as much again.
GUESSED_TOKENS = 512


def most_waiting_bytes(model: PreTrainedModel) -> int:
    """Of outputs that wait for their turn in the sum, at float32: see `cache.LONG_CHOICES`."""
    return LONG_CHOICES * getattr(model.config.get_text_config(), "hidden_size", 0) * 4


@dataclass
class Timings:
    """Where the time inside the experts went, in seconds, since the last reset."""

    total_seconds: float = 0.0  # in the experts' forward altogether
    wait_seconds: float = 0.0  # blocked on reads
    compute_seconds: float = 0.0  # expert arithmetic
    spans: list[Span] | None = None  # set to a list, it gets every computation and layer

    def since(self, started: float, what: str) -> float:
        """Seconds since `started`, which were spent on `what`."""
        ended = time.perf_counter()
        if self.spans is not None:
            self.spans.append((what, started, ended))
        return ended - started


class Routing:
    """What each layer chose for the tokens at hand, which policies of higher layers look at."""

    def __init__(self, top_k: int, n_layers: int) -> None:
        self._none = np.empty((0, top_k), np.int64)
        self.chosen = [self._none] * n_layers

    def note(self, layer: int, rows: np.ndarray, n_experts: int) -> np.ndarray:
        """Take in `rows` [tokens, top_k] of `layer`; what lies below them, as `events.below`."""
        self.chosen[layer] = rows
        lowest = layer
        while lowest > max(0, layer - LAYERS_BELOW) and len(self.chosen[lowest - 1]) == len(rows):
            lowest -= 1  # an encoder's layers, below a decoder's, are of other tokens
        seen = np.stack(self.chosen[lowest : layer + 1], axis=1)
        if layer > LAYERS_BELOW:  # no layer above looks so far down: a prompt's rows take megabytes
            self.chosen[layer - LAYERS_BELOW - 1] = self._none
        return below(seen, layer - lowest, n_experts)


class StreamedExperts:
    """One layer's experts: the cache decides, the reader fills the arena, the module computes."""

    def __init__(
        self,
        number: int,
        first_key: int,
        arena: Arena,
        cache: ExpertCache,
        reader: ExtentReader,
        timings: Timings,
        routing: Routing,
        prefetcher: Prefetcher | None,
        lock: threading.RLock,
    ) -> None:
        self.number = number
        self.first_key = first_key  # of expert 0; above 0 in a cache that layers share
        self.arena = arena
        self.cache = cache
        self.reader = reader
        self.timings = timings
        self.routing = routing
        self.prefetcher = prefetcher
        self.lock = lock
        self.above: StreamedExperts | None = None  # whose experts are guessed here

    def forward(
        self, module: nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden [tokens, width], index and weights [tokens, top_k] -> [tokens, width]."""
        if gradients.needed(hidden, weights):
            return gradients.run(self, module, hidden, index, weights)
        return self.run(module, hidden, index, weights)

    def run(
        self, module: nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """As `forward`, without gradients."""
        with self.lock:  # threads that generate at once are served in turn
            started = time.perf_counter()
            serve = partial(self.serve, index, weights, hidden)
            result = arithmetic.run(module, hidden, index, weights, serve)
            self.timings.total_seconds += self.timings.since(started, "layer")
            return result

    def serve(
        self,
        index: torch.Tensor,
        weights: torch.Tensor,
        hidden: torch.Tensor,
        compute: arithmetic.Compute,
    ) -> None:
        """Compute every expert that `index` names, as one event of the cache."""
        with self.lock:
            # on an accelerator this waits for all that was computed so far, so that no slot
            # whose expert is evicted now is still being read
            rows = index.cpu().numpy()
            known = self.routing.note(self.number, rows, self.arena.layer.n_experts)
            scores = weights.detach().float().cpu().numpy()
            self._serve(Event.of_rows(rows, self.first_key, scores, known), hidden, compute)

    def _serve(self, event: Event, hidden: torch.Tensor, compute: arithmetic.Compute) -> None:
        """Compute every member of `event`: resident ones first, while the others are read.

        Of a long event, in ascending order: what is computed before its turn would be kept.
        """
        if self.prefetcher:
            self.prefetcher.drop(self.number, event.keys - self.first_key)
        guessed, ascending = False, is_long(event)
        for wave in self.cache.waves(event):
            if guessed:  # not the first wave: it takes slots from which the last one computes
                self.arena.settle()
            loads = sorted(wave.loads) if ascending else wave.loads
            pending = dict(loads)
            reads: dict[int, Future[None]] = {}
            try:
                self._start(loads, reads)
                if not guessed:  # now that the drive is busy with what is surely needed
                    self._guess(hidden)
                    guessed = True
                turns = wave.hits + [(key, pending[key]) for key in reads]
                for key, slot in sorted(turns) if ascending else turns:
                    self._wait_for(reads.get(key))
                    pending.pop(key, None)
                    started = time.perf_counter()
                    compute(key - self.first_key, self.arena.parameters[slot])
                    self.timings.compute_seconds += self.timings.since(started, "experts")
            except BaseException:  # a failed read, or Ctrl-C: nothing half-read stays resident
                wait(reads.values())
                for key in pending:
                    self.cache.forget(key)
                raise

    def _wait_for(self, read: Future[None] | None) -> None:
        if read:
            started = time.perf_counter()
            read.result()
            self.timings.wait_seconds += time.perf_counter() - started

    def _start(self, loads: list[tuple[int, int]], reads: dict[int, Future[None]]) -> None:
        """Start reading `loads` (key, slot) into `reads`; first what a guess has begun with."""
        if self.prefetcher:
            for key, slot in loads:
                expert = key - self.first_key
                if read := self.prefetcher.claim(self.number, expert, self.arena, slot):
                    reads[key] = read
        rest = [(key, slot) for key, slot in loads if key not in reads]
        extents = [(key - self.first_key, self.arena.slots[slot]) for key, slot in rest]
        started = self.reader.submit(self.number, extents)
        reads.update(zip((key for key, _ in rest), started, strict=True))

    def _guess(self, hidden: torch.Tensor) -> None:
        if self.prefetcher and (above := self.above):
            slot_of = above.cache.residency.slot_of[above.first_key :]
            self.prefetcher.guess(above.number, hidden[-GUESSED_TOKENS:], slot_of)
