"""The file of a trained policy: safetensors with a format and a kind, checked before use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialise

from flashmoe.disk import files
from flashmoe.errors import FlashMoEError

FORMAT = "flashmoe-policy-1"


def save(
    path: Path, kind: str, tensors: Mapping[str, np.ndarray], about: Mapping[str, Any]
) -> None:
    """Write float32 `tensors`, and `about`, how they were trained; atomically.

    Raises FlashMoEError when `path` cannot be written.
    """
    metadata = {"format": FORMAT, "kind": kind, "about": json.dumps(dict(about), sort_keys=True)}
    content = serialise({k: np.ascontiguousarray(v) for k, v in tensors.items()}, metadata)
    files.replace(path, lambda file: file.write(content))


def read(path: Path, kind: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors, float32, and how they were trained.

    Raises FlashMoEError when `path` is no policy file of that kind.
    """

    def refuse(why: str) -> FlashMoEError:
        return FlashMoEError(f"policy file {path}: {why}; make one with `flashmoe train-policy`")

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = json.loads(metadata.get("about", "{}"))
    except FileNotFoundError:
        raise refuse("no such file") from None
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        raise refuse(f"cannot be read ({error})") from None
    if metadata.get("format") != FORMAT or metadata.get("kind") != kind:
        raise refuse(f"is no {FORMAT} of the kind {kind!r}")
    for name, tensor in tensors.items():
        if tensor.dtype != np.float32 or not np.isfinite(tensor).all():
            raise refuse(f"{name} must be finite float32 numbers")
    return tensors, about


def read_tensors(
    path: Path, kind: str, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """The tensors, if they have exactly these shapes. Raises FlashMoEError otherwise."""
    tensors, _ = read(path, kind)
    actual = {name: tensor.shape for name, tensor in tensors.items()}
    if actual != dict(shapes):
        raise FlashMoEError(
            f"policy file {path}: holds {actual} where {dict(shapes)} is needed, so it is of "
            "another version; train it again with `flashmoe train-policy`"
        )
    return tensors
