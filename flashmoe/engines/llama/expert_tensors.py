"""Which tensors of a GGUF file hold experts, as the program's own reader finds them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from flashmoe.engines.llama.ggml import GGML, _GGUFParameters
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
    lib = ggml.library
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            return None
    context = lib.gguf_init_from_file(str(path).encode(), _GGUFParameters(True, None))
    if not context:
        return None
    try:
        architecture = _text(lib, context, "general.architecture")
        top_k = _number(lib, context, f"{architecture}.expert_used_count")
        data_offset = lib.gguf_get_data_offset(context)
        tensors = []
        for number in range(lib.gguf_get_n_tensors(context)):
            name = lib.gguf_get_tensor_name(context, number).decode(errors="replace")
            if match := _NAME.fullmatch(name):
                n_experts = int(lib.gguf_get_tensor_ne(context, number)[2])
                size = int(lib.gguf_get_tensor_size(context, number))
                offset = data_offset + int(lib.gguf_get_tensor_offset(context, number))
                if n_experts < 1 or size % n_experts:
                    raise FlashMoEError(f"{path}: {name} cannot be divided into its experts")
                layer, kind = int(match[1]), match[2]
                tensors.append(ExpertTensor(name, layer, kind, offset, size, n_experts))
        return GGUFContents(architecture, top_k, tuple(tensors))
    finally:
        lib.gguf_free(context)


def _text(lib, context: int, key: str) -> str:  # type: ignore[no-untyped-def]
    number = lib.gguf_find_key(context, key.encode())
    return lib.gguf_get_val_str(context, number).decode() if number >= 0 else ""


def _number(lib, context: int, key: str) -> int:  # type: ignore[no-untyped-def]
    number = lib.gguf_find_key(context, key.encode())
    return int(lib.gguf_get_val_u32(context, number)) if number >= 0 else 0
