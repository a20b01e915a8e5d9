"""Trains `flashmoe-paper`: one network per layer learns which candidate Belady evicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from flashmoe.cache import simulate
from flashmoe.cache.simulate import Conditions
from flashmoe.errors import FlashMoEError
from flashmoe.policies.flashmoe_paper import Networks, save
from flashmoe.trace import Trace
from flashmoe.train import Report, Training
from flashmoe.train.paper_rows import Rows, empty, of_experts, of_scorer, of_vector

SLOTS = (8, 16, 24, 32)  # a layer; networks are trained for each
ROWS = 10_000  # evictions, or steps, a layer to train on, for each number of slots
HELD_OUT_ROWS = 2000
SEQUENCES = 64  # of a trace that has more, so many are trained on, and an eighth held out
HELD_OUT_ONE_IN = 8
EPOCHS = 200
PATIENCE = 5  # epochs without a lower held-out loss before training stops
LOWER = 2e-5  # by so much; errors are about 0.1
BATCH = 64  # rows
LEAST_ROWS = 10

Curve = list[tuple[float, float]]  # mean squared error of each epoch, in training and held out


class TrainPaper(Training):
    """Scorers 2-128-128-1, one per layer.

    slots: a layer; networks for each. sequential: of a replay in which a token's experts come one
    after another.
    """

    name = "paper"
    reading: ClassVar[str] = "scorer"
    hidden: ClassVar[int] = 128
    learning_rate: ClassVar[float] = 1e-3
    distances: ClassVar[bool] = False  # outputs are distances, whose sign does not count
    rows: ClassVar[Callable[..., Rows]] = staticmethod(of_scorer)

    def __init__(self, slots: Sequence[int] = SLOTS, sequential: bool = False) -> None:
        self.slots = slots
        self.conditions = Conditions(sequential=sequential)

    def run(self, traces: Sequence[Trace], out: Path, seed: int, report: Report) -> dict[str, Any]:
        if len(traces) != 1:
            raise FlashMoEError("kind paper learns one model's layers: give exactly one trace")
        (trace,) = traces
        train, held_out = _split(simulate.streams(trace), seed)
        by_slots, curves, counts = {}, {}, {}
        for slots in self.sizes(trace):
            rows = [
                type(self).rows(trace, sequences, slots, most, self.conditions)
                for sequences, most in ((train, ROWS), (held_out, HELD_OUT_ROWS))
            ]
            counts[slots] = [part.n_watched for part in rows]
            if min(counts[slots]) < LEAST_ROWS:
                raise FlashMoEError(
                    "the trace is too short: hardly an expert is evicted; record more"
                )
            report(f"{slots} slots: {counts[slots][0]:,} rows a layer")
            by_slots[slots], curves[slots] = self._fit(rows[0], rows[1], seed, report)
        about = {
            "trained on": trace.info.get("model", "unknown"),
            "replay": "sequential" if self.conditions.sequential else "event-atomic",
            "rows": counts,  # of a layer in the mean, in training and held out
            "seed": seed,
            "curves": curves,
        }
        save(out, Networks(self.reading, by_slots), about)
        return {"curves": curves, "rows": counts}

    def sizes(self, trace: Trace) -> list[int]:
        """The numbers of slots that leave a choice; raises FlashMoEError where there is none."""
        least = trace.top_k + (not self.conditions.sequential)
        sizes = [slots for slots in self.slots if least <= slots < trace.n_experts]
        if not sizes:
            raise FlashMoEError(
                f"no network is to be trained: {trace.n_experts} experts, {trace.top_k} a token, "
                f"leave no choice with {', '.join(map(str, self.slots))} slots"
            )
        return sizes

    def _fit(
        self, train: Rows, held_out: Rows, seed: int, report: Report
    ) -> tuple[dict[str, np.ndarray], Curve]:
        """All layers' networks, trained at once, and the losses of every epoch."""
        torch.manual_seed(seed)
        layers, n, inputs = train.x.shape
        weights = {
            name: torch.from_numpy(array).requires_grad_()
            for name, array in empty(layers, inputs, self.hidden).items()
        }
        for name in ("w1", "w2", "w3"):  # as torch.nn.Linear starts
            bound = weights[name].shape[1] ** -0.5
            with torch.no_grad():
                weights[name].uniform_(-bound, bound)
        optimiser = torch.optim.AdamW(list(weights.values()), lr=self.learning_rate)
        curve: Curve = []
        best_loss, best = float("inf"), {name: w.detach().clone() for name, w in weights.items()}
        epochs_since_best = 0
        for epoch in range(EPOCHS):
            total = counted = 0.0
            for picks in torch.randperm(n).split(BATCH):
                error, weight = self._error(weights, train, picks)
                if not weight:  # of a short last batch that only fills up
                    continue
                optimiser.zero_grad()
                (error / weight).backward()
                optimiser.step()
                total, counted = total + error.item(), counted + weight.item()
            loss = total / counted + train.spread
            validation = self._held_out(weights, held_out)
            curve.append((round(loss, 6), round(validation, 6)))
            if epoch % 10 == 0:
                report(f"epoch {epoch + 1}: loss {loss:.5f}, held out {validation:.5f}")
            if validation < best_loss - LOWER:
                best_loss, epochs_since_best = validation, 0
                best = {name: w.detach().clone() for name, w in weights.items()}
            else:
                epochs_since_best += 1
                if epochs_since_best == PATIENCE:
                    break
        report(f"stopped after {len(curve)} epochs, best held-out loss {best_loss:.5f}")
        return {name: w.numpy() for name, w in best.items()}, curve

    def _error(
        self, weights: dict[str, torch.Tensor], rows: Rows, picks: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The weighted sum of squared errors of some rows, and the sum of their weights."""
        h = rows.x[:, picks]
        for last in (1, 2):
            h = torch.baddbmm(weights[f"b{last}"][:, None], h, weights[f"w{last}"])
            h = torch.nn.functional.silu(h)
        y = torch.baddbmm(weights["b3"][:, None], h, weights["w3"])
        if self.distances:
            y = y.abs()
        weight = rows.weight[:, picks]
        return (weight * (y - rows.target[:, picks]) ** 2).sum(), weight.sum()

    @torch.no_grad()
    def _held_out(self, weights: dict[str, torch.Tensor], rows: Rows) -> float:
        parts = [self._error(weights, rows, p) for p in torch.arange(rows.x.shape[1]).split(2048)]
        error, weight = (sum(float(part[i]) for part in parts) for i in range(2))
        return error / weight + rows.spread


class TrainPaperVector(TrainPaper):
    """Networks 2C-128-128-C over all C slots at once, one per layer."""

    name = "paper-vector"
    reading = "vector"
    rows = staticmethod(of_vector)


class TrainPaperExperts(TrainPaper):
    """Networks 2E-64-64-E over all E experts, one per layer, that tell distances to next uses.

    As ML_FlashMoE of GitHub malmong/CECAR. It sees no slots: one training serves every number.
    """

    name = "paper-experts"
    reading = "experts"
    hidden = 64
    learning_rate = 2e-3
    distances = True
    rows = staticmethod(of_experts)

    def sizes(self, trace: Trace) -> list[int]:
        return [trace.n_experts]


def _split(sequences: list[np.ndarray], seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Sequences to train on, and those held out to stop early; a lone one is both."""
    most = SEQUENCES * HELD_OUT_ONE_IN // (HELD_OUT_ONE_IN - 1)
    picks = np.random.default_rng(seed).permutation(len(sequences))[:most]
    held_out = picks[::HELD_OUT_ONE_IN]
    train = [pick for pick in picks if pick not in held_out]
    return [sequences[i] for i in (train or picks)], [sequences[i] for i in held_out]
