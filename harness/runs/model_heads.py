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


@cache
def checkpoint_facts(name: str) -> ModelFacts:
    """Of a named model in bfloat16, as a checkpoint."""
    config = config_of(name)
    with TemporaryDirectory() as folder:
        path = Path(folder)
        config.save_pretrained(path)
        model = RandomWeights(config, 0).model
        shapes = {key: (p.dtype, tuple(p.shape)) for key, p in model.named_parameters()}
        with open(path / "model.safetensors", "wb") as file:
            head = file.write(header(shapes))
            sizes = (p.numel() * p.element_size() for p in model.parameters())
            file.truncate(head + sum(sizes))
        facts: ModelFacts = engines.engine_for(path).describe(path)
    return facts


@cache
def gguf_facts(name: str, scheme: str = quant.NONE) -> ModelFacts:
    """Of a named model in a GGUF file of this scheme."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        gguf_file.write(RandomWeights(config_of(name), 0), path, scheme, head_only=True)
        facts: ModelFacts = engines.engine_for(path).describe(path)
    return facts
