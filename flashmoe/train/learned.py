"""Trains `learned`: regression on the logarithm of the candidates' distances to next use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flashmoe.errors import FlashMoEError
from flashmoe.policies.learned import HIDDEN, KIND, Network
from flashmoe.policies.parts import policy_file
from flashmoe.policies.parts.features import N_FEATURES, NAMES
from flashmoe.trace import Trace
from flashmoe.train import Training
from flashmoe.train.decisions import Decisions, gather

ROWS = 6_000_000  # candidates of evictions, shared out by the square root of a trace's length
EPOCHS = 12
BATCH = 8192
LEARNING_RATE = 4e-3
UNKNOWN_SHARE = 0.3  # of the batches in which the router's weights are hidden
SOFTENING = 0.1  # gaps added to a distance before its logarithm

_WEIGHTS = [i for i, name in enumerate(NAMES) if "weight" in name]


class TrainLearned(Training):
    """The network that `learned` runs."""

    name = KIND

    def run(
        self, traces: Sequence[Trace], out: Path, seed: int, report: Callable[[str], object]
    ) -> dict[str, Any]:
        lengths = np.sqrt([trace.experts[..., 0].size for trace in traces])
        parts = []
        for trace, share in zip(traces, lengths / lengths.sum(), strict=True):
            parts.append(gather(trace, int(ROWS * share), seed))
            model = trace.info.get("model", "unknown")
            if not len(parts[-1].features):
                raise FlashMoEError(
                    f"trace of {model}: too short, no expert is ever evicted; record longer "
                    "sequences"
                )
            report(f"{len(parts[-1].features):9,} candidates of evictions, {model}")
        network, losses = fit(parts, lengths, seed, report)
        about = {
            "trained on": [trace.info.get("model", "unknown") for trace in traces],
            "seed": seed,
            "features": list(NAMES),
        }
        policy_file.save(out, KIND, network, about)
        return {"loss": losses, "parameters": sum(w.size for w in network.values())}


def fit(
    parts: Sequence[Decisions],
    weights: Sequence[float] | np.ndarray,
    seed: int,
    report: Callable[[str], object] = lambda line: None,
) -> tuple[Network, list[float]]:
    """One network for all parts, weighted; and its mean loss in every epoch."""
    torch.manual_seed(seed)
    x = torch.from_numpy(np.concatenate([part.features for part in parts]))
    waits = torch.from_numpy(np.concatenate([part.distance_gaps for part in parts]))
    y = torch.log(waits + SOFTENING)
    weight = torch.cat(
        [
            torch.full((len(part.features),), float(share) / len(part.features))
            for part, share in zip(parts, weights, strict=True)
        ]
    )
    weight *= len(weight) / weight.sum()
    mean, spread = x.mean(0), x.std(0) + 1e-3
    known = NAMES.index("weights known")  # may be so throughout, but will not stay so
    mean[known] = spread[known] = 0.5
    x.sub_(mean).div_(spread)
    hidden = ((0 - mean) / spread)[_WEIGHTS]  # what masked weights look like
    first, second = HIDDEN
    net = torch.nn.Sequential(
        torch.nn.Linear(N_FEATURES, first),
        torch.nn.ReLU(),
        torch.nn.Linear(first, second),
        torch.nn.ReLU(),
        torch.nn.Linear(second, 1),
    )
    optimiser = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)
    steps = EPOCHS * -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=steps)
    curve = []
    for _ in range(EPOCHS):
        total = 0.0
        for picks in torch.randperm(len(x)).split(BATCH):
            batch = x[picks]
            if torch.rand(()) < UNKNOWN_SHARE:
                batch[:, _WEIGHTS] = hidden
            loss = (weight[picks] * (net(batch)[:, 0] - y[picks]) ** 2).mean()
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)  # one batch in hundreds explodes
            optimiser.step()
            schedule.step()
            total += loss.item() * len(picks)
        curve.append(total / len(x))
        report(f"epoch {len(curve)} of {EPOCHS}: loss {curve[-1]:.4f}")
    return _export(net, mean, spread), curve


@torch.no_grad()
def _export(net: torch.nn.Sequential, mean: torch.Tensor, spread: torch.Tensor) -> Network:
    """The network on features as they come: standardisation folded into the first layer."""
    first, second, last = (layer for layer in net if isinstance(layer, torch.nn.Linear))
    w1 = first.weight / spread
    tensors = {
        "w1": w1.T,
        "b1": first.bias - w1 @ mean,
        "w2": second.weight.T,
        "b2": second.bias,
        "w3": last.weight[0],
    }
    return {name: tensor.contiguous().numpy() for name, tensor in tensors.items()}
