"""The ceiling's parts: what the predictor sees, learns and decides."""

import numpy as np
import pytest
import torch

from flashmoe import trace
from flashmoe.cache import simulate
from flashmoe.train.shipped_routing import shipped
from harness.ceiling import scripted
from harness.ceiling.moments import EDGES, N_BUCKETS, Sequence, buckets, expected_waits
from harness.ceiling.predictor import Predictor
from harness.ceiling.training import train


@pytest.fixture(scope="module")
def routing() -> trace.Trace:
    return dict(shipped())["12x16-top3"].select(range(3))


@pytest.fixture(scope="module")
def sequences(routing: trace.Trace) -> list[Sequence]:
    return [Sequence(routing, tokens[:48]) for tokens in simulate.streams(routing)]


def test_waits_are_those_until_the_next_use(sequences: list[Sequence]) -> None:
    waits, experts = sequences[0].waits(2).numpy(), sequences[0].experts[:, 2].numpy()
    for t in (0, 7, 46):
        for expert in range(waits.shape[1]):
            later = [u - t for u in range(t + 1, len(experts)) if expert in experts[u]]
            assert waits[t, expert] == (later[0] if later else np.inf)


def test_the_true_waits_hit_as_belady_with_bypass_does(sequences: list[Sequence]) -> None:
    for sequence in sequences:
        for layer in (0, 5):
            found = scripted.hits(sequence, layer, 6, sequence.waits(layer).numpy())
            experts = sequence.trace.experts[sequence.tokens, layer : layer + 1]
            alone = trace.Trace(experts, np.zeros(len(experts), np.int32), 16)
            assert found == simulate.replay(alone, "belady-bypass", 0.375).hits


def test_a_bucket_holds_the_waits_from_its_edge_on() -> None:
    waits = torch.tensor([1.0, 2.0, 3.0, 5.0, 63.0, 64.0, 500.0, torch.inf])
    last = N_BUCKETS - 2
    assert buckets(waits).tolist() == [0, 1, 2, 3, last - 1, last, last, last + 1]


def test_a_certain_wait_is_expected_and_none_is_longer_than_the_longest() -> None:
    chances = torch.eye(N_BUCKETS)
    assert expected_waits(chances, 1e9)[:3].tolist() == list(EDGES[:3])
    assert expected_waits(chances, 5.0).max() == 5.0


@torch.no_grad()
def test_the_predictor_does_not_see_what_is_to_come(sequences: list[Sequence]) -> None:
    torch.manual_seed(0)
    whole, layer, now = sequences[0], 6, 20
    model = Predictor(whole.trace).eval()
    changed = trace.Trace(
        whole.trace.experts.copy(), whole.trace.sequence, whole.trace.n_experts,
        whole.trace.weights, info=whole.trace.info,
    )  # fmt: skip
    changed.experts[whole.tokens[now + 1] :] = np.arange(3)
    changed.experts[whole.tokens[now], layer + 1 :] = np.arange(3)
    before = model(whole, [layer])[0][: now + 1]
    after = model(Sequence(changed, whole.tokens), [layer])[0][: now + 1]
    assert torch.allclose(before, after, atol=1e-5)
    changed.experts[whole.tokens[now], layer] = np.arange(3, 6)
    other = model(Sequence(changed, whole.tokens), [layer])[0][: now + 1]
    assert torch.allclose(before[:now], other[:now], atol=1e-5)
    assert not torch.allclose(before[now], other[now], atol=1e-3)


def test_training_gets_better_on_the_sequences_kept_back(routing: trace.Trace) -> None:
    sequences = [Sequence(routing, tokens[:96]) for tokens in simulate.streams(routing)]
    said: list[str] = []
    train(sequences, 3, said.append)
    losses = [float(line.split()[4]) for line in said]
    assert losses[-1] < losses[0]
