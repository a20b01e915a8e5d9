"""Models that transformers computes: Hugging Face directories and packed stores.

Everything that touches transformers' private parts is in this folder.

loading      `load`: a model whose experts stay on the SSD
engine       what takes over its experts modules
checkpoints  models on disk
model        a model without its experts
experts      the arithmetic of experts
prompting    prompts as token ids
recorder     which experts a model chooses
"""

from __future__ import annotations

import os
from typing import Any


def accepts(path: str | os.PathLike[str]) -> bool:
    """Is `path` this engine's? Directories are, and so is what does not exist.

    `load` refuses the latter with a sentence.
    """
    return not os.path.isfile(path)  # noqa: PTH113  (Path.is_file raises without permission)


def load(path: str | os.PathLike[str], **options: Any) -> Any:
    """As `loading.load`, of which transformers is imported only now, because it takes seconds."""
    from flashmoe.engines.transformers import loading

    return loading.load(path, **options)
