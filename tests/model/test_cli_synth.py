"""The command `synth`: random models of published shapes, as checkpoints and as stores."""

from __future__ import annotations

import shutil

import pytest
import torch
from command_line import refused, run

import flashmoe
from flashmoe.engines.transformers.checkpoints import named_models


def test_a_synthetic_store_needs_no_checkpoint(capfd, tmp_path, monkeypatch):
    small = {
        "vocab_size": 128, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_experts": 8, "num_experts_per_tok": 2,
    }  # fmt: skip
    monkeypatch.setitem(named_models.MODELS, "tiny", named_models.MODELS["olmoe-1b-7b"] | small)
    status, _, _ = run(capfd, "synth", "tiny", tmp_path / "store", "--store")
    assert status == 0
    assert run(capfd, "verify", tmp_path / "store")[0] == 0
    model = flashmoe.load(tmp_path / "store", memory="1MiB")
    assert model(torch.arange(4)[None]).logits.isfinite().all()
    model.flashmoe.close()
    assert "not empty" in refused(capfd, "synth", "tiny", tmp_path / "store", "--store")
    assert named_models.total_bytes("tiny") == sum(p.numel() for p in model.parameters()) * 2


@pytest.mark.parametrize("name", sorted(named_models.MODELS))
def test_the_named_models_have_their_published_size(name):
    """Billions of parameters, as their cards say."""
    published = {
        "olmoe-1b-7b": 6.9, "deepseek-v2-lite": 15.7, "gpt-oss-20b": 20.9,
        "qwen3-30b-a3b": 30.5, "mixtral-8x7b": 46.7,
    }  # fmt: skip
    if name in published:
        assert named_models.total_bytes(name) / 2e9 == pytest.approx(published[name], rel=0.01)


def test_a_full_disk_while_synthesising_is_one_sentence(capfd, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    assert "1.0 MiB free" in refused(capfd, "synth", "olmoe-1b-7b", tmp_path / "s")
    assert not list(tmp_path.iterdir())


def test_synthesising_removes_nothing_that_it_did_not_make(capfd, tmp_path, monkeypatch):
    small = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    monkeypatch.setitem(named_models.MODELS, "tiny", named_models.MODELS["olmoe-1b-7b"] | small)
    (tmp_path / "s.partial").mkdir()
    (tmp_path / "s.partial" / "mine").touch()
    assert run(capfd, "synth", "tiny", tmp_path / "s")[0] == 0
    assert (tmp_path / "s.partial" / "mine").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s", "s.partial"]
