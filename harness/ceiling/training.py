"""Trains the large predictor on a model's recorded sequences, until others get no better."""

from __future__ import annotations

import copy
import random

import torch
from torch.nn import functional

from harness.ceiling.moments import N_BUCKETS, Sequence, buckets
from harness.ceiling.predictor import Predictor
from harness.progress import Say

LAYERS_AT_ONCE = 4  # of a sequence, drawn anew each time
SEQUENCES_AT_ONCE = 4
LEARNING_RATE = 1.5e-3
KEPT_BACK_ONE_IN = 12  # sequences that say when it is enough
LONGEST_TOKENS = 512  # of a sequence in training


def train(sequences: list[Sequence], epochs: int, say: Say, seed: int = 0) -> Predictor:
    """The predictor of the epoch that was the best on the sequences kept back."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    cut = [Sequence(s.trace, s.tokens[:LONGEST_TOKENS]) for s in sequences]
    draw.shuffle(cut)
    n_kept = max(1, len(cut) // KEPT_BACK_ONE_IN)
    kept, learnt = cut[:n_kept], cut[n_kept:]
    model = Predictor(sequences[0].trace)
    _standardise(model, learnt, draw)
    optimiser = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.02)
    steps = epochs * -(-len(learnt) // SEQUENCES_AT_ONCE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, steps, pct_start=0.1)
    best, best_loss = copy.deepcopy(model.state_dict()), float("inf")
    for epoch in range(epochs):
        draw.shuffle(learnt)
        for first in range(0, len(learnt), SEQUENCES_AT_ONCE):
            for sequence in learnt[first : first + SEQUENCES_AT_ONCE]:
                (_loss(model, sequence, draw) / SEQUENCES_AT_ONCE).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
        loss = _held_out_loss(model, kept)
        say(f"epoch {epoch + 1} of {epochs}: {loss:.4f} on the sequences kept back")
        if loss < best_loss:
            best, best_loss = copy.deepcopy(model.state_dict()), loss
    model.load_state_dict(best)
    return model.eval()


def _standardise(model: Predictor, sequences: list[Sequence], draw: random.Random) -> None:
    samples = [
        s.features(draw.randrange(s.trace.n_layers))
        for s in draw.sample(sequences, min(12, len(sequences)))
    ]
    model.standardise(torch.cat([sample.flatten(0, 1) for sample in samples]))


def _loss(model: Predictor, sequence: Sequence, draw: random.Random) -> torch.Tensor:
    n_layers = sequence.trace.n_layers
    layers = draw.sample(range(n_layers), min(LAYERS_AT_ONCE, n_layers))
    logits = torch.stack(model(sequence, layers))
    wanted = torch.stack([buckets(sequence.waits(layer)) for layer in layers])
    return functional.cross_entropy(logits.view(-1, N_BUCKETS), wanted.flatten())


@torch.no_grad()
def _held_out_loss(model: Predictor, sequences: list[Sequence]) -> float:
    model.eval()
    fixed = random.Random(0)
    losses = [float(_loss(model, sequence, fixed)) for sequence in sequences]
    model.train()
    return sum(losses) / len(losses)
