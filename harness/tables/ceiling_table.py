"""The ceiling: the gap closed by a large predictor that is trained on the model itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flashmoe import trace
from flashmoe.cache import simulate
from flashmoe.trace import Trace
from flashmoe.train.learned import LONGEST_WAIT
from harness.ceiling import scripted
from harness.ceiling.moments import Sequence, expected_waits
from harness.ceiling.predictor import Predictor
from harness.ceiling.training import train
from harness.progress import Say
from harness.tables import data_splits, hit_rates
from harness.tables.hit_rates import Case

CAPACITIES = (0.25, 0.375, 0.5)
BESIDE = ("lru", "learned", "belady", "belady-bypass")
_RESAMPLES = 1000


def table(folder: Path, epochs: int, say: Say) -> list[dict[str, Any]]:
    """A row for each trace of `folder` and capacity: held-out sequences, every one cold."""
    rows = []
    for case in hit_rates.outside_cases(folder):
        whole = trace.load(folder / f"{case.trace}.npz")
        learnt = _learnt(whole, case)
        n_learnt = len(learnt.names())
        say(f"{case.trace}: learning from {n_learnt} sequences")
        model = train(_sequences(learnt), epochs, say)
        about = {
            "trace": case.trace,
            "part": case.part,
            "trained_on_sequences": len(learnt.names()),
        }
        about |= {"parameters": sum(p.numel() for p in model.parameters())}
        rows += [about | row for row in _rows(case.routing, model)]
    return rows


def _learnt(whole: Trace, case: Case) -> Trace:
    """What may be learnt from: subjects that are not held out, or the sequences not replayed."""
    if case.part == data_splits.UNSEEN_DOMAIN:
        return data_splits.take(whole, data_splits.TRAINED)
    replayed = set(case.routing.names())
    return whole.select([i for i, name in enumerate(whole.names()) if name not in replayed])


def _sequences(whole: Trace) -> list[Sequence]:
    return [Sequence(whole, tokens) for tokens in simulate.streams(whole)]


def _rows(routing: Trace, model: Predictor) -> Iterator[dict[str, Any]]:
    counts = predicted_hits(routing, model)
    picks = np.random.default_rng(hit_rates.SEED).integers(
        0, len(counts), (_RESAMPLES, len(counts))
    )
    for number, capacity in enumerate(CAPACITIES):
        others = {name: simulate.replay(routing, name, capacity) for name in BESIDE}
        requests = others["lru"].per_stream[:, 0]
        streams = {name: replay.per_stream[:, 1] for name, replay in others.items()}
        streams["predictor"] = counts[:, number]
        rates = {name: hits.sum() / requests.sum() for name, hits in streams.items()}
        gap = streams["belady"] - streams["lru"]
        row: dict[str, Any] = {"capacity": capacity, "slots": simulate.slots_for(routing, capacity)}
        row |= {f"{name.replace('-', '_')}_hit_rate": round(r, 5) for name, r in rates.items()}
        for name in ("learned", "predictor"):
            over = streams[name] - streams["lru"]
            low, high = np.percentile(over[picks].sum(1) / gap[picks].sum(1), [2.5, 97.5])
            row |= {f"{name}_gap_closed": round(float(over.sum() / gap.sum()), 4)}
            row |= {f"{name}_gap_low": round(float(low), 4)}
            row |= {f"{name}_gap_high": round(float(high), 4)}
        yield row | {"sequences": len(counts)}


@torch.no_grad()
def predicted_hits(routing: Trace, model: Predictor) -> np.ndarray:
    """[sequences, capacities] int64: hits where the predictor's waits decide."""
    slots = [simulate.slots_for(routing, capacity) for capacity in CAPACITIES]
    sequences = _sequences(routing)
    found = np.zeros((len(sequences), len(slots)), np.int64)
    for number, sequence in enumerate(sequences):
        for layer, logits in enumerate(model(sequence, list(range(routing.n_layers)))):
            chances = logits.softmax(-1)
            for i, n in enumerate(slots):
                waits = expected_waits(chances, LONGEST_WAIT * n / routing.top_k)
                found[number, i] += scripted.hits(sequence, layer, n, waits.numpy())
    return found
