"""The same weights as every contender reads them: a store, a hub's directory, a GGUF file."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from flashmoe import quant
from flashmoe.engines.transformers.checkpoints.named_models import config_of, total_bytes
from flashmoe.engines.transformers.checkpoints.synth import synthesise_store
from flashmoe.errors import FlashMoEError
from flashmoe.store import manifest as manifests
from flashmoe.trace import Trace
from harness.progress import say
from harness.runs import gguf_file, hub_checkpoint, peers
from harness.runs.contenders import STORE
from harness.runs.self_routing_weights import SteeredWeights

# By the name that rows bear: our scheme, llama.cpp's, and bits a weight with its scales, at most.
WEIGHTS = {
    "bf16": (quant.NONE, "bf16", 16.0),
    "int8": ("int8", "q8_0", 8.5),
    "int4": ("int4", "q4_0", 5.0),
    "mxfp4": ("mxfp4", "mxfp4_moe", 4.25),
}
_DENSE_SHARE = 0.1  # of a model's bytes, at most: they stay bf16


@dataclass(frozen=True)
class SameWeights:
    """Of a named model, in `home`. recorded: the routing that they lead to, and its tokens."""

    name: str
    weights: str  # of WEIGHTS
    home: Path
    recorded: Trace

    def path(self, kind: str) -> Path:
        ending = ".gguf" if kind == peers.GGUF else f"-{kind}"
        return self.home / f"steered-{self.name}-{self.weights}{ending}"

    def refusal(self, kind: str) -> str | None:
        """Why these weights are not written so; None where they are."""
        if kind != peers.CHECKPOINT:
            return None
        if self.weights != "bf16":
            return f"it reads bf16 only, no {self.weights}"
        family = config_of(self.name).model_type
        if family not in hub_checkpoint.FAMILIES:
            return f"{family} is not written for it"
        return None

    @cached_property
    def model_bytes(self) -> int:
        """Of the whole model in bf16, whatever these weights are."""
        return total_bytes(self.name)

    @property
    def size_bytes(self) -> int:
        """Of one kind of files, estimated from above."""
        bits = WEIGHTS[self.weights][2]
        return int(self.model_bytes * (_DENSE_SHARE + (1 - _DENSE_SHARE) * bits / 16))

    def missing_bytes(self, kinds: Iterable[str]) -> int:
        return sum(self.size_bytes for kind in kinds if not self.path(kind).exists())

    def write(self, kind: str) -> Path:
        """Where it is not yet; a directory or a file that is there is whole."""
        path = self.path(kind)
        if path.exists():
            return path
        say(f"writing {self.name}, {self.weights}, as {kind}")
        scheme, type_name, _ = WEIGHTS[self.weights]
        unfinished = path.with_name(f"{path.name}.partial")
        remove(unfinished)
        steered = partial(SteeredWeights, trace=self.recorded)
        if kind == STORE:
            synthesise_store(self.name, unfinished, weights=steered, quant=scheme)
            if not manifests.is_store(unfinished):
                raise FlashMoEError(f"{unfinished} was not written whole")
        elif kind == peers.CHECKPOINT:
            hub_checkpoint.write(steered(config_of(self.name), 0), unfinished)
        else:
            stored = partial(gguf_file.embeddings_in_file, scheme=type_name)
            source = steered(config_of(self.name), 0, stored=stored)
            gguf_file.write(source, unfinished, type_name)
        unfinished.rename(path)
        return path

    def give_back(self) -> None:
        for kind in (STORE, peers.CHECKPOINT, peers.GGUF):
            remove(self.path(kind))


def remove(path: Path) -> None:
    """A file or a directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
