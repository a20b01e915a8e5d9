"""Named models as files that have a head and no weights, for what reads heads alone."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from flashmoe import engines, quant
from flashmoe.disk.shards import header
from flashmoe.engines.model_facts import ModelFacts
from flashmoe.engines.transformers.checkpoints.named_models import config_of
from flashmoe.engines.transformers.checkpoints.random_weights import RandomWeights
from harness.runs import gguf_file


def write_checkpoint(name: str, folder: Path) -> Path:
    """A named model in bfloat16; the file is as long as with weights, and takes no room."""
    config = config_of(name)
    config.save_pretrained(folder)
    parameters = dict(RandomWeights(config, 0).model.named_parameters())
    with open(folder / "model.safetensors", "wb") as file:
        shapes = {key: (p.dtype, tuple(p.shape)) for key, p in parameters.items()}
        head_bytes = file.write(header(shapes))
        file.truncate(head_bytes + sum(p.numel() * p.element_size() for p in parameters.values()))
    return folder


def write_gguf(name: str, path: Path, scheme: str = quant.NONE) -> Path:
    """A named model in this scheme; likewise."""
    gguf_file.write(RandomWeights(config_of(name), 0), path, scheme, head_only=True)
    return path


@cache
def checkpoint_facts(name: str) -> ModelFacts:
    with TemporaryDirectory() as folder:
        return _facts(write_checkpoint(name, Path(folder)))


@cache
def gguf_facts(name: str, scheme: str = quant.NONE) -> ModelFacts:
    with TemporaryDirectory() as folder:
        return _facts(write_gguf(name, Path(folder) / "model.gguf", scheme))


def _facts(path: Path) -> ModelFacts:
    facts: ModelFacts = engines.engine_for(path).describe(path)
    return facts
