"""Training of policies: it learns something, and what it writes runs."""

from __future__ import annotations

import numpy as np
import pytest

import flashmoe
import flashmoe.train.learned as training
from flashmoe import trace, train
from flashmoe.cache import simulate
from flashmoe.cli import main
from flashmoe.errors import FlashMoEError
from flashmoe.policies.parts import policy_file
from flashmoe.trace import Trace
from flashmoe.train import paper, paper_rows, shipped_routing


@pytest.fixture(scope="module")
def short_traces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traces")
    whole = trace.load(flashmoe.demo_routing_path())
    part = whole.select(range(0, 36, 4))
    small = Trace(
        part.experts[:, :2], part.sequence, part.n_experts, part.weights[:, :2], info=part.info
    )
    small.save(folder / "small.npz")
    return folder / "small.npz"


def test_training_learns_something_and_its_file_runs(short_traces, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(training, "ROWS", 60_000)
    out = tmp_path / "policy.safetensors"
    assert main(["train-policy", str(short_traces), "--out", str(out)]) == 0
    said = capfd.readouterr().out
    assert "epoch 12 of 12" in said
    held = trace.load(flashmoe.demo_routing_path()).select([1, 3])
    lru, ours = (simulate.replay(held, name, 0.4).hit_rate for name in ("lru", f"learned:{out}"))
    assert ours > lru + 0.01
    _, about = policy_file.read(out, "learned")
    shipped = [made.info["model"] for _, made in shipped_routing.shipped()]
    assert about["trained on"][0] == "flashmoe demo"
    assert about["trained on"][-len(shipped) :] == shipped  # so that it keeps what they taught


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("kind", ["paper", "paper-vector", "paper-experts"])
def test_the_papers_networks_train_and_run(kind, sequential, short_traces, tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "ROWS", 300)
    monkeypatch.setattr(paper, "EPOCHS", 3)
    out = tmp_path / "paper.safetensors"
    training = train.kinds()[kind]((8, 16, 32), sequential)
    report = training.run([trace.load(short_traces)], out, 0, lambda line: None)
    choices = [16, 32] if not sequential else [8, 16, 32]  # an event of 8 leaves no choice with 8
    assert list(report["curves"]) == ([64] if kind == "paper-experts" else choices)
    for curve in report["curves"].values():
        assert curve[-1][0] < curve[0][0]
    small = trace.load(short_traces).select([0])
    conditions = simulate.Conditions(sequential=sequential)
    rates = [
        simulate.replay(small, policy, 0.5, conditions).hit_rate
        for policy in (f"flashmoe-paper:{out}", "belady")
    ]
    assert 0.5 < rates[0] < rates[1]


def plain_evictions(rows, slots):
    """Of single requests, by lists: (age and uses of each slot's expert), victim's slot, most."""
    resident, arrival, seen = [], [], []
    for now, key in enumerate(rows):
        if key in resident:
            continue
        if len(resident) < slots:
            resident.append(key)
            arrival.append(now)
            continue
        past = []
        for other in resident:
            uses = [t for t in range(now) if rows[t] == other]
            past.append((now - max(uses), len(uses)))
        due = [[*rows[now + 1 :], other].index(other) for other in resident]
        # of those that are never used again, the longest resident
        victim = max(range(slots), key=lambda slot: (due[slot], -arrival[slot]))
        seen.append((past, victim, max(rows[: now + 1].count(other) for other in rows)))
        resident[victim], arrival[victim] = key, now
    return seen


def test_the_rows_are_belady_evictions_and_next_uses():
    rng = np.random.default_rng(3)
    rows = np.minimum(rng.geometric(0.3, 80) - 1, 7).tolist()
    recorded = Trace(np.array(rows, np.uint8)[:, None, None], np.zeros(80, np.int32), 8)
    conditions, streams = simulate.Conditions(), simulate.streams(recorded)
    seen = plain_evictions(rows, 3)
    vectors = paper_rows.of_vector(recorded, streams, 3, 1000, conditions)
    assert vectors.n_watched == vectors.x.shape[1] == len(seen)
    for x, target, (past, victim, most) in zip(vectors.x[0], vectors.target[0], seen, strict=True):
        expected = [number for age, uses in past for number in (1 / (age + 1), uses / most)]
        np.testing.assert_allclose(x, expected, rtol=1e-6)
        assert target.tolist() == np.eye(3)[victim].tolist()
    scorers = paper_rows.of_scorer(recorded, streams, 3, 1000, conditions)
    assert scorers.weight.sum() == 3 * len(seen)
    assert (scorers.weight * scorers.target).sum() == pytest.approx(len(seen), rel=1e-5)
    steps = paper_rows.of_experts(recorded, streams, 3, 1000, conditions)
    for now in (0, 10, 79):
        ahead = [[*rows[now + 1 :], *[None] * 9, key].index(key) + 1 for key in range(8)]
        expected = [(min(distance, 6) - 1) / 5 for distance in ahead]  # 6 of 8 is the horizon
        np.testing.assert_allclose(steps.target[0, now], expected, rtol=1e-6)


def test_no_network_is_trained_where_nothing_is_chosen(short_traces, tmp_path):
    recorded = trace.load(short_traces)
    with pytest.raises(FlashMoEError, match="leave no choice with 8, 64 slots"):
        paper.TrainPaper((8, 64)).run([recorded], tmp_path / "p.safetensors", 0, print)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "policy.txt"], "must end in .safetensors"),
        (["--out", "nowhere/p.safetensors"], "its directory does not exist"),
        (["--out", "p.safetensors", "--kind", "magic"], "choose from learned, paper"),
    ],
)
def test_train_policy_refuses_in_a_sentence(
    arguments, said, short_traces, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    assert main(["train-policy", str(short_traces), *arguments]) == 1
    assert said in capfd.readouterr().err
