"""Trains `learned`: regression on the logarithm of the candidates' distances to next use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flashmoe.errors import FlashMoEError
from flashmoe.policies.learned import HIDDEN, KIND, Network
from flashmoe.policies.parts import policy_file
from flashmoe.policies.parts.features import N_FEATURES, NAMES
from flashmoe.trace import Trace
from flashmoe.train import Report, Training
from flashmoe.train.decisions import Decisions, gather

ROWS = 6_000_000  # of all traces; each gets a share by the square root of its length
EPOCHS = 12
BATCH = 8192  # rows
LEARNING_RATE = 4e-3
MASKED_SHARE = 0.3  # how many of the batches hide the router's weights
SOFTENING_GAPS = 0.1  # added to a distance before its logarithm

_WEIGHTS = [i for i, name in enumerate(NAMES) if "weight" in name]


class TrainLearned(Training):
    """The network that `learned` runs."""

    name = KIND

    def run(self, traces: Sequence[Trace], out: Path, seed: int, report: Report) -> dict[str, Any]:
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
    report: Report = lambda line: None,
) -> tuple[Network, list[float]]:
    """One network for all parts, which count by `weights`, and its mean loss in every epoch."""
    torch.manual_seed(seed)
    x = torch.from_numpy(np.concatenate([part.features for part in parts]))
    distances = torch.from_numpy(np.concatenate([part.distance_gaps for part in parts]))
    y = torch.log(distances + SOFTENING_GAPS)
    weight = torch.cat(
        [
            torch.full((len(part.features),), float(share) / len(part.features))
            for part, share in zip(parts, weights, strict=True)
        ]
    )
    weight *= len(weight) / weight.sum()
    mean, spread = x.mean(0), x.std(0) + 1e-3
    flag = NAMES.index("weights known")  # it may be 1 in all rows, but masking makes it vary
    mean[flag] = spread[flag] = 0.5
    x.sub_(mean).div_(spread)
    masked = ((0 - mean) / spread)[_WEIGHTS]  # standardised zeros
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
            if torch.rand(()) < MASKED_SHARE:
                batch[:, _WEIGHTS] = masked
            loss = (weight[picks] * (net(batch)[:, 0] - y[picks]) ** 2).mean()
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)  # a rare batch would explode
            optimiser.step()
            schedule.step()
            total += loss.item() * len(picks)
        curve.append(total / len(x))
        report(f"epoch {len(curve)} of {EPOCHS}: loss {curve[-1]:.4f}")
    return _export(net, mean, spread), curve


@torch.no_grad()
def _export(net: torch.nn.Sequential, mean: torch.Tensor, spread: torch.Tensor) -> Network:
    """The network on raw features: standardisation is folded into the first layer."""
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
