"""LM Studio's models: GGUF files as PUBLISHER/REPOSITORY/FILE.gguf, below one of its folders."""

from __future__ import annotations

import os
import re
from pathlib import Path

from flashmoe.errors import FlashMoEError

PROGRAM = "LM Studio"

_FOLDERS = (".lmstudio/models", ".cache/lm-studio/models")  # below the user's own
_LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf")


def find(name: str) -> Path | None:
    """The file of a model: PUBLISHER/REPOSITORY, or either's end, or FILE; @q4_k_m tells which.

    Also PUBLISHER/REPOSITORY:FILE.gguf, as on the hub. Upper and lower case are the same.
    Raises FlashMoEError where several files have this name.
    """
    wanted, _, variant = name.lower().replace(":", "/").partition("@")
    found = [
        path
        for folder in _FOLDERS
        for path in sorted((Path.home() / folder).glob("*/*/*.gguf"))
        if wanted in _names(path) and path.stem.lower().endswith(variant)
        if "mmproj" not in path.name and not _LATER_PART.search(path.name)
    ]
    if len(found) > 1:
        files = ", ".join("/".join(path.parts[-3:]) for path in found)
        raise FlashMoEError(f"LM Studio has several files of {name}: name one of {files}")
    return found[0] if found and os.access(found[0], os.R_OK) else None


def _names(path: Path) -> set[str]:
    """What a file may be called, in lower case."""
    publisher, repository, file = (part.lower() for part in path.parts[-3:])
    short = repository.removesuffix("-gguf")  # as LM Studio lists it
    names = {repository, short, file, path.stem.lower()}
    return names | {f"{publisher}/{one}" for one in (repository, short, f"{repository}/{file}")}
