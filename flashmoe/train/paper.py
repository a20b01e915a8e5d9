"""Trains `flashmoe-paper`: one network per layer learns which candidate Belady evicts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from flashmoe.cache import simulate
from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.errors import FlashMoEError
from flashmoe.events import Event, Events
from flashmoe.policies.base import Scope
from flashmoe.policies.flashmoe_paper import KIND, FlashMoEPaper, inputs_of, leave, observe, shapes
from flashmoe.policies.parts import policy_file
from flashmoe.policies.parts.next_uses import Future, advance
from flashmoe.trace import Trace
from flashmoe.train import Report, Training
from flashmoe.util import many_jobs

CAPACITY = 0.5  # share of a layer's experts that have slots, as in the paper
EVICTIONS = 400  # about as many per layer to train on, and as many held out
EPOCHS = 200
PATIENCE = 8  # epochs without a lower held-out loss before training stops
BATCH = 50  # evictions
LEARNING_RATE = 1e-3
HELD_OUT_ONE_IN = 8  # sequences
EVICTIONS_SEEN, ROWS = 0, 1  # positions in `Pupil.progress`


class Pupil(FlashMoEPaper):
    """Evicts as Belady does, and writes down what the networks would see at one in `skip`."""

    name = "pupil"
    offline = True

    def __init__(self, scope: Scope, n_slots: int, rows: int, skip: int) -> None:
        super().__init__(scope, n_slots, _empty(1, 2))
        self.skip = skip
        self.future = Future.unknown(self.n_keys)
        self.progress = np.zeros(2, np.int64)  # by EVICTIONS_SEEN, ROWS
        self.inputs = np.zeros((rows, n_slots, 2), np.float32)  # by slot; 0 where no candidate is
        self.candidate = np.zeros((rows, n_slots), np.bool_)  # by slot
        self.evicted = np.zeros(rows, np.int64)  # the victim's slot

    def foresee(self, events: Events) -> None:
        self.future = Future.of(events, self.n_keys)

    def touch(self, event: Event, now: int) -> None:
        observe(self, event)
        advance(self.future, event.keys)

    def victim(self, candidates: np.ndarray) -> int:
        victim = candidates[np.argmax(self.future.due[candidates])]
        row = self.progress[ROWS]
        if self.progress[EVICTIONS_SEEN] % self.skip == 0 and row < len(self.evicted):
            for key in candidates:
                slot = self.slot[key]
                self.candidate[row, slot] = True
                self.inputs[row, slot, 0], self.inputs[row, slot, 1] = inputs_of(self, key)
            self.evicted[row] = self.slot[victim]
            self.progress[ROWS] += 1
        self.progress[EVICTIONS_SEEN] += 1
        leave(self, victim)
        return victim


class TrainPaper(Training):
    """Scorers 2-128-128-1, one per layer."""

    name = "paper"
    vector: ClassVar[bool] = False

    def run(self, traces: Sequence[Trace], out: Path, seed: int, report: Report) -> dict[str, Any]:
        if len(traces) != 1:
            raise FlashMoEError("kind paper learns one model's layers: give exactly one trace")
        (trace,) = traces
        sequences = simulate.streams(trace)
        last = len(sequences) - 1
        held_out = set(range(HELD_OUT_ONE_IN - 1, len(sequences), HELD_OUT_ONE_IN)) or {last}
        train = [s for number, s in enumerate(sequences) if number not in held_out] or sequences
        parts = []
        for part in (train, [sequences[number] for number in sorted(held_out)]):
            jobs = [(trace, layer, part, EVICTIONS) for layer in range(trace.n_layers)]
            parts.append(list(many_jobs.outcomes(_watch, jobs, threads=True)))
        counts = [min(len(layer[2]) for layer in part) for part in parts]
        if min(counts) < 10:
            raise FlashMoEError("the trace is too short: hardly an expert is evicted; record more")
        data = [
            [torch.from_numpy(np.stack([layer[i][:n] for layer in part])) for i in range(3)]
            for part, n in zip(parts, counts, strict=True)
        ]
        networks, curve = _fit(data[0], data[1], self.vector, seed, report)
        about = {
            "trained on": trace.info.get("model", "unknown"),
            "shape": "vector" if self.vector else "scorer",
            "capacity": CAPACITY,
            "seed": seed,
            "curve": curve,
        }
        policy_file.save(out, KIND, networks, about)
        return {"curve": curve}


class TrainPaperVector(TrainPaper):
    """Networks 2C-128-128-C over all C slots at once, one per layer."""

    name = "paper-vector"
    vector = True


def _watch(
    trace: Trace, layer: int, sequences: list[np.ndarray], rows: int
) -> tuple[np.ndarray, ...]:
    """(inputs, candidate, evicted) of about `rows` of Belady's evictions, each sequence cold.

    Their shapes are [rows, slots, 2], [rows, slots] and [rows]; see `Pupil`.
    """
    scope = Scope(trace.n_experts, trace.top_k, 1, layer, trace.n_layers)
    slots = simulate.slots_for(trace, CAPACITY)
    rows_each = -(-rows // len(sequences))
    parts: list[tuple[np.ndarray, ...]] = []
    for tokens in sequences:
        evictions = len(tokens) * trace.top_k // 8  # Belady evicts for about one request in eight
        skip = max(1, evictions // rows_each)
        pupil = Pupil(scope, slots, rows_each, skip)
        events = simulate.events_of(trace, tokens, range(layer, layer + 1))
        pupil.foresee(events)
        ExpertCache(pupil).replay(events)
        n = pupil.progress[ROWS]
        parts.append((pupil.inputs[:n], pupil.candidate[:n], pupil.evicted[:n]))
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


def _fit(
    train: list[torch.Tensor],
    held_out: list[torch.Tensor],
    vector: bool,
    seed: int,
    report: Report,
) -> tuple[dict[str, np.ndarray], list[tuple[float, float]]]:
    """All layers' networks, trained at once, and the (train, held-out) loss of every epoch."""
    torch.manual_seed(seed)
    layers, n, slots, _ = train[0].shape
    inputs = 2 * slots if vector else 2
    weights = {
        name: torch.from_numpy(array).requires_grad_()
        for name, array in _empty(layers, inputs).items()
    }
    for name in ("w1", "w2", "w3"):  # as torch.nn.Linear starts
        bound = weights[name].shape[1] ** -0.5
        with torch.no_grad():
            weights[name].uniform_(-bound, bound)
    optimiser = torch.optim.AdamW(list(weights.values()), lr=LEARNING_RATE)
    curve: list[tuple[float, float]] = []
    best_loss, best = float("inf"), {name: w.detach().clone() for name, w in weights.items()}
    epochs_since_best = 0
    for epoch in range(EPOCHS):
        total = 0.0
        for picks in torch.randperm(n).split(BATCH):
            loss = _loss(weights, [part[:, picks] for part in train], vector)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.item() * len(picks) / n
        with torch.no_grad():
            validation = _loss(weights, held_out, vector).item()
        curve.append((round(total, 6), round(validation, 6)))
        if epoch % 10 == 0:
            report(f"epoch {epoch + 1}: loss {total:.5f}, held out {validation:.5f}")
        if validation < best_loss - 1e-6:
            best_loss, epochs_since_best = validation, 0
            best = {name: w.detach().clone() for name, w in weights.items()}
        else:
            epochs_since_best += 1
            if epochs_since_best == PATIENCE:
                break
    report(f"stopped after {len(curve)} epochs, best held-out loss {best_loss:.5f}")
    return {name: w.numpy() for name, w in best.items()}, curve


def _loss(weights: dict[str, torch.Tensor], part: list[torch.Tensor], vector: bool) -> torch.Tensor:
    """Mean squared error over candidates: 1 for the expert that Belady evicts, else 0."""
    inputs, candidate, evicted = part
    layers, n, slots, _ = inputs.shape
    x = inputs.reshape(layers, n, 2 * slots) if vector else inputs.reshape(layers, n * slots, 2)
    h = torch.nn.functional.silu(torch.baddbmm(weights["b1"][:, None], x, weights["w1"]))
    h = torch.nn.functional.silu(torch.baddbmm(weights["b2"][:, None], h, weights["w2"]))
    y = torch.baddbmm(weights["b3"][:, None], h, weights["w3"]).reshape(layers, n, slots)
    target = torch.nn.functional.one_hot(evicted, slots).float()
    return ((y - target) ** 2)[candidate].mean()


def _empty(layers: int, inputs: int) -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, np.float32) for name, shape in shapes(layers, inputs).items()}
