"""Training of policies: it learns something, and what it writes runs."""

from __future__ import annotations

import pytest

import flashmoe
import flashmoe.train.learned as training
from flashmoe import trace, train
from flashmoe.cache import simulate
from flashmoe.cli import main
from flashmoe.errors import FlashMoEError
from flashmoe.policies.parts import policy_file
from flashmoe.trace import Trace
from flashmoe.train import paper, shipped_routing


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


@pytest.mark.parametrize("kind", ["paper", "paper-vector"])
def test_the_papers_networks_train_and_run(kind, short_traces, tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "EVICTIONS", 40)
    monkeypatch.setattr(paper, "EPOCHS", 3)
    out = tmp_path / "paper.safetensors"
    report = train.kinds()[kind]().run([trace.load(short_traces)], out, 0, lambda line: None)
    losses = [loss for loss, _ in report["curve"]]
    assert losses[-1] < losses[0]
    small = trace.load(short_traces).select([0])
    assert simulate.replay(small, f"flashmoe-paper:{out}", 0.5).hit_rate > 0.5
    if kind == "paper-vector":
        with pytest.raises(FlashMoEError, match="are for 32 slots, not 16"):
            simulate.replay(small, f"flashmoe-paper:{out}", 0.25)


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
