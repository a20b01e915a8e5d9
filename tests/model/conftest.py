"""Fixtures of what is loaded from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from tiny import make_checkpoint

import flashmoe
from flashmoe.engines.transformers.checkpoints.pack import pack
from flashmoe.engines.transformers.model import packed_linear


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_checkpoint("olmoe", tmp_path / "olmoe")


@pytest.fixture(params=["in place", "packed"])
def load(request, tmp_path):
    """Load a checkpoint as it lies, or packed; closed afterwards."""
    models = []

    def get(folder: Path) -> transformers.PreTrainedModel:
        if request.param == "packed":
            pack(folder, tmp_path / "store")
            folder = tmp_path / "store"
        models.append(flashmoe.load(folder, memory="1MiB", policy="lru"))
        return models[-1]

    yield get
    for model in models:
        model.flashmoe.close()


@pytest.fixture
def packing(monkeypatch):
    """Linear layers are packed, whatever that does to their bits on this processor."""
    try:
        packed_linear.PackedLinear(torch.nn.Linear(64, 64).bfloat16())
    except (AttributeError, RuntimeError):
        pytest.skip("oneDNN has no such kernel here")
    monkeypatch.setattr(packed_linear, "_same_bits", lambda *_: True)
