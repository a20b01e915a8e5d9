"""Models that transformers computes: Hugging Face directories and packed stores.

Everything that touches transformers' private parts is in this folder.

loading      `load`: a model whose experts stay on the SSD
engine       what takes over its experts modules
checkpoints  models on disk
model        a model without its experts
experts      the arithmetic of experts
description  what a model takes, before it is loaded
session      prompts, and the model that continues them
prompting    prompts as token ids
recorder     which experts a model chooses
serving      a server of OpenAI's requests
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashmoe.engines.model_facts import ModelFacts
    from flashmoe.engines.serving import ServeSettings, Watch
    from flashmoe.engines.transformers.session import TransformersSession


def accepts(path: str | os.PathLike[str]) -> bool:
    """Is `path` this engine's? Directories are, and so is what does not exist.

    `load` refuses the latter with a sentence.
    """
    return not os.path.isfile(path)  # noqa: PTH113  (Path.is_file raises without permission)


def load(path: str | os.PathLike[str], **options: Any) -> Any:
    """As `loading.load`, of which transformers is imported only now, because it takes seconds."""
    from flashmoe.engines.transformers import loading

    return loading.load(path, **options)


def open_session(
    path: str | os.PathLike[str], prompts: Sequence[str], **options: Any
) -> TransformersSession:
    """As `session.TransformersSession`."""
    from flashmoe.engines.transformers.session import TransformersSession

    return TransformersSession(Path(path), prompts, **options)


def verify(
    path: str | os.PathLike[str], progress: Callable[[int, int], object], also: Sequence[Path] = ()
) -> str:
    """As `reading.verify.verify`, of a store."""
    from flashmoe.reading.verify import verify as verify_store

    found = verify_store(Path(path), progress, also)
    count = sum(layer.n_experts for layer in found.manifest.layers)
    copies = f", in {found.n_copies} copies" if found.n_copies > 1 else ""
    shares = found.manifest.shares
    in_shares = f", each shared among {shares} files" if shares > 1 else ""
    return f"all {count} experts are as they were packed{copies}{in_shares}"


def serve(path: str | os.PathLike[str], settings: ServeSettings, watch: Watch) -> int:
    """As `serving.server.serve`."""
    from flashmoe.engines.transformers.serving import server

    return server.serve(path, settings, watch)


def describe(path: str | os.PathLike[str]) -> ModelFacts:
    """As `description.describe`."""
    from flashmoe.engines.transformers.description import describe as describe_checkpoint

    return describe_checkpoint(Path(path))
