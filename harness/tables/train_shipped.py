"""Trains the policies that ship, on the sequences that data_splits.py does not hold out."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import flashmoe
from flashmoe import trace
from flashmoe.policies import flashmoe_paper
from flashmoe.trace import Trace
from flashmoe.train.learned import TrainLearned
from flashmoe.train.paper import TrainPaper, TrainPaperExperts, TrainPaperVector
from flashmoe.train.shipped_routing import shipped
from flashmoe.train.variants import variants
from harness.tables import data_splits

PAPER_SLOTS = (16, 32)  # more would make the package large


def train_learned(outside: Iterable[Trace], path: Path, seed: int) -> None:
    """Write `learned` to `path`, trained on the shipped routing and on `outside`."""
    small = {name: data_splits.take(whole, data_splits.TRAINED) for name, whole in shipped()}
    large = [data_splits.take(whole, data_splits.TRAINED) for whole in outside]
    varied = [made for whole in (small["demo"], *large) for made in variants(whole)]
    TrainLearned(from_nothing=True).run([*small.values(), *large, *varied], path, seed, print)


def train_paper(seed: int) -> None:
    """Write the paper's networks in place of those that ship, trained on the demo model."""
    demo = data_splits.take(trace.load(flashmoe.demo_routing_path()), data_splits.TRAINED)
    for kind in (TrainPaper, TrainPaperVector, TrainPaperExperts):
        kind(PAPER_SLOTS).run([demo], flashmoe_paper.SHIPPED[kind.reading], seed, print)
