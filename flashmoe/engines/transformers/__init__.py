"""Models that transformers computes: Hugging Face directories and packed stores.

All that touches transformers' private parts is in this folder.
"""

from __future__ import annotations

import os
from typing import Any


def accepts(path: str | os.PathLike[str]) -> bool:
    """Directories; and what does not exist, which is refused with a sentence."""
    return not os.path.isfile(path)  # noqa: PTH113  (Path's raises where it may not look)


def load(path: str | os.PathLike[str], **options: Any) -> Any:
    """See `loading.load`; transformers is imported only here, which takes seconds."""
    from flashmoe.engines.transformers import loading

    return loading.load(path, **options)
