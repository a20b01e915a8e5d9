"""What each feature of `learned` is worth.

Trains it again and again on the shipped split without a group of features, and without some of
the traces, and prints the gap closed on the held-out part of the folder's traces.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from flashmoe import trace
from flashmoe.cache import simulate
from flashmoe.policies.learned import KIND, Network
from flashmoe.policies.parts import policy_file
from flashmoe.policies.parts.features import NAMES
from flashmoe.trace import Trace
from flashmoe.train.decisions import Decisions, gather
from flashmoe.train.learned import fit
from flashmoe.train.shipped_routing import shipped
from flashmoe.util import many_jobs
from harness.tables import data_splits, hit_rates
from harness.tables.hit_rates import Case

CAPACITY = 0.375
ROWS = 1_500_000
SEED = 1
GROUPS = {
    "nothing": (),
    "votes": ("vote", "similar"),
    "votes of pairs and triples": ("vote 2", "vote 3", "similar pairs"),
    "votes that fade slowly": tuple(
        f"vote {weighting}, fading {fading}"
        for weighting in range(4)
        for fading in (0.85, 0.9, 0.95)
    ),
    "router weights": ("weight",),
    "fading counts": ("fading count",),
    "recency": ("recency",),
    "sizes and depth": ("slots", "experts / top_k", "depth", "tokens so far"),
}  # fmt: skip


def train_without(
    parts: Sequence[Decisions], weights: Sequence[float], prefixes: tuple[str, ...]
) -> Network:
    """The network that never sees features whose names start with one of `prefixes`."""
    columns = [i for i, name in enumerate(NAMES) if name.startswith(prefixes)] if prefixes else []
    blind = []
    for part in parts:
        features = part.features.copy()
        features[:, columns] = 0
        blind.append(Decisions(features, part.waits))
    network, _ = fit(blind, weights, SEED)
    network["w1"][columns] = 0
    return network


def closed(cases: Sequence[Case], network: Network) -> list[float]:
    """The share of the gap that `network` closes in each case."""
    names = ("lru", "learned", "belady")
    jobs = [(case.routing, name, network) for case in cases for name in names]
    rates = np.array(list(many_jobs.outcomes(hit_rate, jobs))).reshape(len(cases), len(names))
    return [float((ours - lru) / (belady - lru)) for lru, ours, belady in rates]


def hit_rate(routing: Trace, policy: str, network: Network) -> float:
    """Of a policy, where it is `learned` with `network`, written to a file where this runs."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "p.safetensors"
        policy_file.save(path, KIND, network, {})
        name = f"learned:{path}" if policy == "learned" else policy
        return simulate.replay(routing, name, CAPACITY).hit_rate


def print_table(folder: Path) -> None:
    """A row for each group of features and of traces, a column for each held-out part."""
    cases = hit_rates.outside_cases(folder)
    small = dict(shipped())
    wholes = dict(small)
    for path in sorted(folder.glob("*.npz")):
        whole = trace.load(path)
        if any(data_splits.part_of(name) == data_splits.UNSEEN_DOMAIN for name in whole.names()):
            wholes[path.stem] = whole
    taken = {name: data_splits.take(whole, data_splits.TRAINED) for name, whole in wholes.items()}
    sizes = {name: float(np.sqrt(part.experts[..., 0].size)) for name, part in taken.items()}
    total = sum(sizes.values())
    parts = {
        name: gather(part, int(ROWS * sizes[name] / total), SEED) for name, part in taken.items()
    }
    print("| without | " + " | ".join(f"{case.trace}, {case.part}" for case in cases) + " |")
    print("|---|" + "---|" * len(cases))

    def row(label: str, names: Sequence[str], prefixes: tuple[str, ...]) -> None:
        network = train_without([parts[n] for n in names], [sizes[n] for n in names], prefixes)
        print(
            f"| {label} | " + " | ".join(f"{s:.1%}" for s in closed(cases, network)) + " |",
            flush=True,
        )

    for label, prefixes in GROUPS.items():
        row(label, list(parts), prefixes)
    real = [name for name in parts if name not in small]
    row("the small models' routing", real, ())
    row("the real model's routing", [name for name in parts if name not in real], ())
    row("all but the demo model's", ["demo"], ())
