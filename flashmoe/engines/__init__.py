"""Engines, one folder each. Each package has the same functions, and imports little before them.

accepts(path)                    does the engine run what lies there?
load(path, *, memory, ...)       a model as its users know it, with `.flashmoe` beside it
open_session(path, prompts, ...) prompts and the model that continues them (`session.Session`)
verify(path, progress, also)     read every byte, of copies too, and check it; what was right
describe(path)                   what the model takes (`model_facts.ModelFacts`), from headers alone
serve(path, settings, watch)     answer requests until told to end (`serving.ServeSettings`)

`engine_for` finds the one that takes a path, `hub.on_disk` what a name stands for.
Commands know engines by these functions alone.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from types import ModuleType
from typing import Any

from flashmoe.engines import hub
from flashmoe.errors import FlashMoEError


def available() -> dict[str, ModuleType]:
    """Every engine by name. None of them imports its libraries before it loads something."""
    return {
        info.name: importlib.import_module(f"{__name__}.{info.name}")
        for info in pkgutil.iter_modules(__path__)
        if info.ispkg
    }


def engine_for(path: str | os.PathLike[str]) -> Any:
    """The engine that takes what lies at `path`. Raises FlashMoEError when none does."""
    for engine in available().values():
        if engine.accepts(path):
            return engine
    raise FlashMoEError(
        f"{path}: no engine runs such a file; give a GGUF file, a Hugging Face model or a store"
    )


def load(
    path: str | os.PathLike[str], *, memory: int | str, revision: str | None = None, **options: Any
) -> Any:
    """A model whose experts stay on the SSD, by the engine that takes what lies at `path`.

    path: a Hugging Face directory or a packed store (see `engines.transformers.loading.load`), or
        a GGUF file (see `engines.llama.hosts.llama_cpp.load`).
        Where nothing lies there it is a name: one that Ollama or LM Studio know, or org/name or
        org/name:file.gguf on the hub (`hub`).
    memory: bytes, or a size such as "4GiB", that experts may occupy; "auto": what is free,
        and less or more as that changes.
    revision: of a name on the hub: a branch, tag or commit.
    options: the engine's own; all know `also`, the same model on other drives. What is returned is
        what the engine's users know, with `.flashmoe`, an `engines.base.Engine`, beside it.
    Raises FlashMoEError when no engine takes the path, and as the engine does.
    """
    found = hub.on_disk(path, revision)
    return engine_for(found).load(found, memory=memory, **options)
