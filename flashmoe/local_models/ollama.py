"""Ollama's models: a manifest for each name, which says which blob is the GGUF file."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from flashmoe.errors import FlashMoEError, reading

PROGRAM = "Ollama"

_PART = r"[A-Za-z0-9_][\w.-]*"
# [[HOST/]NAMESPACE/]MODEL[:TAG]
_NAME = re.compile(
    rf"(?:(?:(?P<host>{_PART}(?::\d+)?)/)?(?P<namespace>{_PART})/)?"
    rf"(?P<model>{_PART})(?::(?P<tag>{_PART}))?"
)
_DEFAULTS = {"host": "registry.ollama.ai", "namespace": "library", "model": "", "tag": "latest"}
_GGUF = "application/vnd.ollama.image.model"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_SERVICE = Path("/usr/share/ollama/.ollama/models")  # where Linux runs it as a user of its own


def find(name: str) -> Path | None:
    """The blob of a model such as gpt-oss:20b. Raises FlashMoEError where it is no GGUF file."""
    parts = _NAME.fullmatch(name)
    if parts is None:
        return None
    place = [parts[part] or default for part, default in _DEFAULTS.items()]
    for folder in _folders():
        manifest = folder.joinpath("manifests", *place)
        if os.path.isfile(manifest):  # noqa: PTH113  (Path.is_file raises without permission)
            return _blob(folder, manifest, name)
    return None


def _folders() -> list[Path]:
    """Where models may be kept; only there where Ollama is told a place."""
    if told := os.environ.get("OLLAMA_MODELS"):
        return [Path(told)]
    return [Path.home() / ".ollama" / "models", _SERVICE]


def _blob(folder: Path, manifest: Path, name: str) -> Path:
    """Raises FlashMoEError where the manifest names no GGUF file, or the file is not there."""
    with reading(manifest):
        text = manifest.read_text(errors="replace")
    try:
        layers = json.loads(text)["layers"]
        digests = [str(layer["digest"]) for layer in layers if layer["mediaType"] == _GGUF]
    except (ValueError, KeyError, TypeError):
        raise FlashMoEError(
            f"{manifest} is no manifest of Ollama's that can be read: `ollama pull {name}` again"
        ) from None
    if len(digests) != 1 or not _DIGEST.fullmatch(digests[0]):
        raise FlashMoEError(f"Ollama does not keep {name} as one GGUF file: name another model")
    for spelling in (digests[0].replace(":", "-"), digests[0]):  # the second until 2024
        if os.path.isfile(blob := folder / "blobs" / spelling):  # noqa: PTH113
            return blob
    raise FlashMoEError(
        f"Ollama knows {name}, but {folder / 'blobs' / digests[0].replace(':', '-')} is not "
        f"there: `ollama pull {name}` again"
    )
