"""The networks of the paper's table: three readings, for each trace, replay and number of slots."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import flashmoe
from flashmoe import trace, train
from flashmoe.errors import FlashMoEError
from flashmoe.trace import Trace
from flashmoe.train import paper
from flashmoe.util import many_jobs
from harness.tables import data_splits

REPLAYS = ("event-atomic", "sequential")
KINDS = {"scorer": "paper", "vector": "paper-vector", "experts": "paper-experts"}  # of readings
SEED = 20261124
MOST_TOKENS = 512  # of a tested sequence, as in the paper
MOST_TESTED = 20  # sequences of a trace given from outside; the others are trained on


@dataclass(frozen=True)
class Routing:
    """A trace, cut into what networks are trained on and what they are tested on."""

    name: str
    part: str  # what is tested, in words
    trained: Trace
    tested: Trace


def routings(folder: Path | None) -> list[Routing]:
    """The demo model's routing, and every trace of `folder`.

    Raises FlashMoEError where there is none.
    """
    whole = trace.load(flashmoe.demo_routing_path())
    parts = [data_splits.take(whole, p) for p in (data_splits.TRAINED, data_splits.UNSEEN_DOMAIN)]
    found = [Routing("demo", data_splits.UNSEEN_DOMAIN, *parts)]
    if folder is None:
        return found
    paths = sorted(folder.glob("*.npz"))
    if not paths:
        raise FlashMoEError(f"{folder} holds no trace (*.npz)")
    return found + [_outside(path) for path in paths]


def _outside(path: Path) -> Routing:
    """Tested on unseen subjects where sequences are named so, else on every n-th sequence."""
    whole = trace.load(path)
    names = whole.names()
    named = all(name.count("/") == 2 for name in names)
    unseen = [i for i, n in enumerate(names) if data_splits.part_of(n) == data_splits.UNSEEN_DOMAIN]
    choice = unseen if named and unseen else list(range(len(names)))
    tested = choice[:: -(-len(choice) // MOST_TESTED)]
    held_back = set(choice if named and unseen else tested)
    trained = [i for i in range(len(names)) if i not in held_back]
    part = data_splits.UNSEEN_DOMAIN if named and unseen else "other sequences"
    held_out = whole.select(tested).heads(MOST_TOKENS)
    return Routing(path.stem, part, whole.select(trained or tested), held_out)


def path_of(folder: Path, routing: str, replay: str, reading: str) -> Path:
    return folder / f"{routing}-{replay}-{reading}.safetensors"


def train_all(chosen: Sequence[Routing], folder: Path, say: Callable[[str], object]) -> None:
    """Train, one a core, all networks that `folder` does not have yet."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [
        (routing.trained, replay, reading, path)
        for routing in chosen
        for replay in REPLAYS
        for reading in KINDS
        if not (path := path_of(folder, routing.name, replay, reading)).exists()
    ]
    for line in many_jobs.outcomes(_train, jobs):
        say(line)


def _train(routing: Trace, replay: str, reading: str, path: Path) -> str:
    torch.set_num_threads(1)
    kind = train.kinds()[KINDS[reading]]
    assert issubclass(kind, paper.TrainPaper)
    lines: list[str] = []
    sizes = kind(sequential=replay == "sequential").run([routing], path, SEED, lines.append)
    rows = ", ".join(f"{n:,}" for n, _ in sizes["rows"].values())
    return f"trained {path.stem}: {rows} rows a layer"


def labels(folder: Path, routing: Routing, replay: str, slots: int) -> Iterator[tuple[str, str]]:
    """(name in the table, policy) of each reading that was trained for so many slots."""
    for reading, kind in KINDS.items():
        training = train.kinds()[kind]
        assert issubclass(training, paper.TrainPaper)
        sizes = training(sequential=replay == "sequential").sizes(routing.trained)
        if slots in sizes or reading == "experts":
            path = path_of(folder, routing.name, replay, reading)
            yield f"flashmoe-paper, {reading}", f"flashmoe-paper:{path}"
