"""Which tensors of a GGUF file hold experts, as the program's own reader finds them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from flashmoe.engines.llama.ggml import GGML
from flashmoe.engines.llama.gguf_head import GGUFHead, read_head
from flashmoe.errors import FlashMoEError

_NAME = re.compile(r"blk\.(\d{1,9})\.ffn_(gate|up|down|gate_up)_exps\.weight")
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")  # as llama.cpp names the parts of a split file


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
    top_k: int  # of the layer with the most; 0 without experts, and in a split file's later parts
    tensors: tuple[ExpertTensor, ...]
    part: int = 0  # of a split file
    parts: int = 1


def contents_of(ggml: GGML, path: Path) -> GGUFContents | None:
    """The experts in `path`; None for a file that the program's reader does not take.

    Raises FlashMoEError for experts that are laid out in a way that is not understood.
    """
    head = read_head(ggml, path)
    if head is None:
        return None
    tensors = expert_tensors(path, head)
    return GGUFContents(head.architecture, head.top_k, tensors, head.part, head.parts)


def parts_of(ggml: GGML, path: Path) -> list[Path]:
    """`path`, and the other parts where it is the first one of a split file.

    Raises FlashMoEError where it is no file that llama.cpp reads, or the parts are not all there.
    """
    head = _head_of(ggml, path)
    if head.parts == 1:
        return [path]
    named = _PART.fullmatch(path.name)
    if head.part or named is None or int(named[2]) != 1 or int(named[3]) != head.parts:
        raise FlashMoEError(
            f"{path} is part {head.part + 1} of a model in {head.parts} files: name the "
            f"first, whose name ends with -00001-of-{head.parts:05}.gguf"
        )
    parts = [
        path.with_name(f"{named[1]}-{number:05}-of-{head.parts:05}.gguf")
        for number in range(1, head.parts + 1)
    ]
    if missing := [part for part in parts if not part.exists()]:
        raise FlashMoEError(
            f"{missing[0]} is missing: the {head.parts} files of this model belong in one folder"
        )
    return parts


def heads_of(ggml: GGML, path: Path) -> dict[Path, GGUFHead]:
    """Of each part. Raises FlashMoEError as `parts_of`, and where a later part cannot be read."""
    return {part: _head_of(ggml, part) for part in parts_of(ggml, path)}


def _head_of(ggml: GGML, path: Path) -> GGUFHead:
    if (head := read_head(ggml, path)) is None:
        raise FlashMoEError(f"{path} is no GGUF file that llama.cpp can read: fetch it again")
    return head


def is_experts(name: str) -> bool:
    """Does a tensor of this name hold experts?"""
    return _NAME.fullmatch(name) is not None


def expert_tensors(path: Path, head: GGUFHead) -> tuple[ExpertTensor, ...]:
    """Those of a file that hold experts. Raises FlashMoEError where one does not divide."""
    tensors = []
    for place in head.tensors:
        if match := _NAME.fullmatch(place.name):
            n_experts, size = place.shape[2], place.size_bytes
            if n_experts < 1 or size < n_experts or size % n_experts or place.shape[3] != 1:
                raise FlashMoEError(f"{path}: {place.name} cannot be divided into its experts")
            layer, kind = int(match[1]), match[2]
            tensors.append(
                ExpertTensor(place.name, layer, kind, place.offset_bytes, size, n_experts)
            )
    return tuple(tensors)
