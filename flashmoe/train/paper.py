"""Trains `flashmoe-paper`: a network a layer learns which candidate Belady evicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from flashmoe.cache import simulate
from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.errors import FlashMoEError
from flashmoe.events import Event, Events
from flashmoe.policies.base import Scope
from flashmoe.policies.belady import next_uses
from flashmoe.policies.flashmoe_paper import KIND, FlashMoEPaper, inputs_of, leave, observe, shapes
from flashmoe.policies.parts import policy_file
from flashmoe.trace import Trace
from flashmoe.train import Training

CAPACITY = 0.5  # the paper's C = 32 of OLMoE's 64
EVICTIONS = 400  # a layer: epochs of seconds on 2 cores
EPOCHS, PATIENCE = 200, 8
BATCH = 50  # evictions
LEARNING_RATE = 1e-3
HELD_OUT_ONE_IN = 8  # sequences


class Pupil(FlashMoEPaper):
    """Evicts as Belady does and writes down what the networks would have seen."""

    name = "pupil"
    offline = True

    def __init__(self, scope: Scope, n_slots: int, rows: int, skip: int) -> None:
        super().__init__(scope, n_slots, _empty(1, 2))
        self.skip = skip
        self.next_use = np.empty(0, np.int64)
        self.distance = np.full(self.n_keys, np.iinfo(np.int64).max)
        self.place = np.zeros(3, np.int64)  # requests, evictions, rows written
        self.seen = np.zeros((rows, n_slots, 2), np.float32)  # by slot; 0 where no candidate is
        self.candidate = np.zeros((rows, n_slots), np.bool_)
        self.evicted = np.zeros(rows, np.int64)

    def foresee(self, events: Events) -> None:
        self.next_use = next_uses(events, self.n_keys)

    def touch(self, event: Event, now: int) -> None:
        observe(self, event)
        for key in event.keys:
            self.distance[key] = self.next_use[self.place[0]]
            self.place[0] += 1

    def victim(self, candidates: np.ndarray) -> int:
        chosen = candidates[np.argmax(self.distance[candidates])]
        row = self.place[2]
        if self.place[1] % self.skip == 0 and row < len(self.evicted):
            for key in candidates:
                slot = self.slot[key]
                self.candidate[row, slot] = True
                self.seen[row, slot, 0], self.seen[row, slot, 1] = inputs_of(self, key)
            self.evicted[row] = self.slot[chosen]
            self.place[2] += 1
        self.place[1] += 1
        leave(self, chosen)
        return chosen


class TrainPaper(Training):
    """Scorers 2-128-128-1, one a layer."""

    name = "paper"
    vector: ClassVar[bool] = False

    def run(
        self, traces: Sequence[Trace], out: Path, seed: int, report: Callable[[str], object]
    ) -> dict[str, Any]:
        if len(traces) != 1:
            raise FlashMoEError("kind paper learns one model's layers: give exactly one trace")
        (trace,) = traces
        turns = simulate.streams(trace)
        held = set(range(HELD_OUT_ONE_IN - 1, len(turns), HELD_OUT_ONE_IN)) or {len(turns) - 1}
        train = [t for number, t in enumerate(turns) if number not in held] or turns
        parts = [
            [_watch(trace, layer, some, EVICTIONS) for layer in range(trace.n_layers)]
            for some in (train, [turns[number] for number in sorted(held)])
        ]
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
    """Networks 2C-128-128-C over all C slots at once, one a layer."""

    name = "paper-vector"
    vector = True


def _watch(trace: Trace, layer: int, turns: list[np.ndarray], rows: int) -> tuple[np.ndarray, ...]:
    """(seen, candidate, evicted) of about `rows` of Belady's evictions, sequences starting cold."""
    scope = Scope(trace.n_experts, trace.top_k, 1, layer, trace.n_layers)
    slots = simulate.slots_for(trace, CAPACITY)
    each = -(-rows // len(turns))
    found: list[tuple[np.ndarray, ...]] = []
    for tokens in turns:
        skip = max(1, len(tokens) * trace.top_k // 8 // each)
        pupil = Pupil(scope, slots, each, skip)
        events = simulate.events_of(trace, tokens, range(layer, layer + 1))
        pupil.foresee(events)
        ExpertCache(pupil).replay(events)
        n = pupil.place[2]
        found.append((pupil.seen[:n], pupil.candidate[:n], pupil.evicted[:n]))
    return tuple(np.concatenate(arrays) for arrays in zip(*found, strict=True))


def _fit(
    train: list[torch.Tensor],
    held: list[torch.Tensor],
    vector: bool,
    seed: int,
    report: Callable[[str], object],
) -> tuple[dict[str, np.ndarray], list[tuple[float, float]]]:
    """All layers' networks at once (batched products); (train, held-out) loss of every epoch."""
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
    best, kept = float("inf"), {name: w.detach().clone() for name, w in weights.items()}
    since = 0
    for epoch in range(EPOCHS):
        total = 0.0
        for picks in torch.randperm(n).split(BATCH):
            loss = _loss(weights, [part[:, picks] for part in train], vector)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.item() * len(picks) / n
        with torch.no_grad():
            validation = _loss(weights, held, vector).item()
        curve.append((round(total, 6), round(validation, 6)))
        if epoch % 10 == 0:
            report(f"epoch {epoch + 1}: loss {total:.5f}, held out {validation:.5f}")
        if validation < best - 1e-6:
            best, since = validation, 0
            kept = {name: w.detach().clone() for name, w in weights.items()}
        else:
            since += 1
            if since == PATIENCE:
                break
    report(f"stopped after {len(curve)} epochs, best held-out loss {best:.5f}")
    return {name: w.numpy() for name, w in kept.items()}, curve


def _loss(weights: dict[str, torch.Tensor], part: list[torch.Tensor], vector: bool) -> torch.Tensor:
    """Mean squared error over candidates: 1 for the expert that Belady evicts, else 0."""
    seen, candidate, evicted = part
    layers, n, slots, _ = seen.shape
    x = seen.reshape(layers, n, 2 * slots) if vector else seen.reshape(layers, n * slots, 2)
    h = torch.nn.functional.silu(torch.baddbmm(weights["b1"][:, None], x, weights["w1"]))
    h = torch.nn.functional.silu(torch.baddbmm(weights["b2"][:, None], h, weights["w2"]))
    y = torch.baddbmm(weights["b3"][:, None], h, weights["w3"]).reshape(layers, n, slots)
    target = torch.nn.functional.one_hot(evicted, slots).float()
    return ((y - target) ** 2)[candidate].mean()


def _empty(layers: int, inputs: int) -> dict[str, np.ndarray]:
    return {name: np.zeros(of, np.float32) for name, of in shapes(layers, inputs).items()}
