"""Which tensors of a GGUF file hold experts, as the program's own reader finds them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from flashmoe.engines.llama.ggml import GGML
from flashmoe.engines.llama.gguf_head import GGUFHead, read_head
from flashmoe.errors import FlashMoEError

_NAME = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down|gate_up)_exps\.weight")


@dataclass(frozen=True)
class ExpertTensor:
    """All experts' weights of one kind in one layer, side by side in a file."""

    name: str
    layer: int  # its number in the file's names
    kind: str  # gate, up, down or gate_up
    offset_bytes: int  # in the file
    size_bytes: int
    n_experts: int

    @property
    def expert_bytes(self) -> int:
        return self.size_bytes // self.n_experts


@dataclass(frozen=True)
class GGUFContents:
    """What the cache has to know of a GGUF file."""

    architecture: str
    top_k: int  # 0 in a later part of a split file, which has no settings
    tensors: tuple[ExpertTensor, ...]


def contents_of(ggml: GGML, path: Path) -> GGUFContents | None:
    """The experts in `path`; None for a file that the program's reader does not take.

    Raises FlashMoEError for experts that are laid out in a way that is not understood.
    """
    head = read_head(ggml, path)
    if head is None:
        return None
    return GGUFContents(head.architecture, head.top_k, expert_tensors(path, head))


def expert_tensors(path: Path, head: GGUFHead) -> tuple[ExpertTensor, ...]:
    """Those of a file that hold experts. Raises FlashMoEError where one does not divide."""
    tensors = []
    for place in head.tensors:
        if match := _NAME.fullmatch(place.name):
            n_experts, size = place.shape[2], place.size_bytes
            if n_experts < 1 or size % n_experts:
                raise FlashMoEError(f"{path}: {place.name} cannot be divided into its experts")
            layer, kind = int(match[1]), match[2]
            tensors.append(
                ExpertTensor(place.name, layer, kind, place.offset_bytes, size, n_experts)
            )
    return tuple(tensors)
