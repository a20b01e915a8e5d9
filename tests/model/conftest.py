"""Fixtures of what is loaded from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_gguf
import transformers
from tiny import make_checkpoint

import flashmoe
from flashmoe.engines.transformers.checkpoints.pack import pack


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


@pytest.fixture(scope="session")
def gguf_files(tmp_path_factory):
    """A tiny model as a GGUF file, by family and scheme; made once."""
    made: dict[tuple[str, str], Path] = {}

    def get(family: str = "olmoe", scheme: str = "int4") -> Path:
        if (family, scheme) not in made:
            path = tmp_path_factory.mktemp("gguf") / f"{family}-{scheme}.gguf"
            made[family, scheme] = tiny_gguf.write(path, family, scheme)
        return made[family, scheme]

    return get
