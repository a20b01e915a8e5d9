"""Trains `learned`: regression on how long candidates of an eviction wait for their next use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flashmoe.errors import FlashMoEError
from flashmoe.policies.learned import HIDDEN, KIND, SHIPPED, Network, load
from flashmoe.policies.parts import policy_file
from flashmoe.policies.parts.features import N_FEATURES, NAMES
from flashmoe.trace import Trace
from flashmoe.train import Report, Training
from flashmoe.train.decisions import Decisions, gather
from flashmoe.train.shipped_routing import shipped
from flashmoe.train.variants import variants

ROWS = 6_000_000  # of all traces; each gets a share by the square root of its length
EPOCHS = 12
BATCH = 8192  # rows
LEARNING_RATE, GOING_ON_RATE = 4e-3, 1e-3
MASKED_SHARE = 0.3  # how many of the batches hide the router's weights
# Turnovers beyond which a wait is no longer told from a longer one: no policy keeps an expert so
# long, so what a network can tell is better spent on shorter waits.
LONGEST_WAIT = 3

_WEIGHTS = [i for i, name in enumerate(NAMES) if "weight" in name]


class TrainLearned(Training):
    """The network that `learned` runs.

    It goes on from the shipped network, with the shipped routing beside the traces given, so that
    it keeps what that one knows of other models. from_nothing: from these traces alone.
    """

    name = KIND

    def __init__(self, *, from_nothing: bool = False) -> None:
        self._from_nothing = from_nothing

    def run(self, traces: Sequence[Trace], out: Path, seed: int, report: Report) -> dict[str, Any]:
        wholes = list(traces)
        if not self._from_nothing:
            wholes += [made for whole in traces for made in variants(whole)]
            wholes += [whole for _, whole in shipped()]
        lengths = np.sqrt([whole.experts[..., 0].size for whole in wholes])
        parts = []
        for whole, share in zip(wholes, lengths / lengths.sum(), strict=True):
            parts.append(gather(whole, int(ROWS * share), seed))
            model = whole.info.get("model", "unknown")
            if not len(parts[-1].features):
                raise FlashMoEError(
                    f"trace of {model}: too short, no expert is ever evicted; record longer "
                    "sequences"
                )
            report(f"{len(parts[-1].features):9,} candidates of evictions, {model}")
        start = None if self._from_nothing else load(SHIPPED)
        network, losses = fit(parts, lengths, seed, report, start)
        about = {
            "trained on": [whole.info.get("model", "unknown") for whole in wholes],
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
    start: Network | None = None,
) -> tuple[Network, list[float]]:
    """One network for all parts, which count by `weights`, and its mean loss in every epoch.

    start: a network that it goes on from, in smaller steps.
    """
    torch.manual_seed(seed)
    x = torch.from_numpy(np.concatenate([part.features for part in parts]))
    y = torch.from_numpy(np.concatenate([part.waits for part in parts])).clamp_(max=LONGEST_WAIT)
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
    if start:
        _take(net, start, mean, spread)
    rate = GOING_ON_RATE if start else LEARNING_RATE
    optimiser = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=1e-4)
    steps = EPOCHS * -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
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
def _take(
    net: torch.nn.Sequential, start: Network, mean: torch.Tensor, spread: torch.Tensor
) -> None:
    """The inverse of `_export`."""
    first, second, last = (layer for layer in net if isinstance(layer, torch.nn.Linear))
    w1, b1, w2, b2, w3 = (torch.from_numpy(start[name]) for name in ("w1", "b1", "w2", "b2", "w3"))
    first.weight.copy_(w1.T * spread)
    first.bias.copy_(b1 + w1.T @ mean)
    second.weight.copy_(w2.T)
    second.bias.copy_(b2)
    last.weight[0] = w3
    last.bias.zero_()


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
