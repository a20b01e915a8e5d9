"""Which tensors of a GGUF file hold experts, as the program's own reader finds them."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashmoe.engines.llama.ggml import GGML, _GGUFParameters
from flashmoe.errors import FlashMoEError, reading

_NAME = re.compile(r"blk\.(\d{1,9})\.ffn_(gate|up|down|gate_up)_exps\.weight")
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")  # as llama.cpp names the parts of a split file
_STRING, _ARRAY = 8, 9  # types of settings
_INTEGERS = {
    0: ctypes.c_uint8, 1: ctypes.c_int8, 2: ctypes.c_uint16, 3: ctypes.c_int16,
    4: ctypes.c_uint32, 5: ctypes.c_int32, 10: ctypes.c_uint64, 11: ctypes.c_int64,
}  # fmt: skip


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
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            return None
    with _opened(ggml, path) as context:
        if not context:
            return None
        architecture = _text(ggml.library, context, "general.architecture")
        return GGUFContents(
            architecture,
            _number(ggml.library, context, f"{architecture}.expert_used_count"),
            tuple(_tensors(ggml.library, context, path)),
            _number(ggml.library, context, "split.no"),
            max(_number(ggml.library, context, "split.count"), 1),
        )


def parts_of(ggml: GGML, path: Path) -> list[Path]:
    """`path`, and the other parts where it is the first one of a split file.

    Raises FlashMoEError where it is no file that llama.cpp reads, or the parts are not all there.
    """
    with reading(path):
        contents = contents_of(ggml, path)
    if contents is None:
        raise FlashMoEError(f"{path} is no GGUF file that llama.cpp can read: fetch it again")
    if contents.parts == 1:
        return [path]
    named = _PART.fullmatch(path.name)
    if contents.part or named is None or int(named[2]) != 1 or int(named[3]) != contents.parts:
        raise FlashMoEError(
            f"{path} is part {contents.part + 1} of a model in {contents.parts} files: name the "
            f"first, whose name ends with -00001-of-{contents.parts:05}.gguf"
        )
    parts = [
        path.with_name(f"{named[1]}-{number:05}-of-{contents.parts:05}.gguf")
        for number in range(1, contents.parts + 1)
    ]
    if missing := [part for part in parts if not part.exists()]:
        raise FlashMoEError(
            f"{missing[0]} is missing: the {contents.parts} files of this model belong in one "
            "folder"
        )
    return parts


@contextmanager
def _opened(ggml: GGML, path: Path) -> Iterator[int | None]:
    lib = ggml.library
    context = lib.gguf_init_from_file(os.fsencode(path), _GGUFParameters(True, None))
    try:
        yield context
    finally:
        if context:
            lib.gguf_free(context)


def _tensors(lib: Any, context: int, path: Path) -> Iterator[ExpertTensor]:
    data_offset = lib.gguf_get_data_offset(context)
    for number in range(lib.gguf_get_n_tensors(context)):
        name = lib.gguf_get_tensor_name(context, number).decode(errors="replace")
        if match := _NAME.fullmatch(name):
            shape = lib.gguf_get_tensor_ne(context, number)
            size = int(lib.gguf_get_tensor_size(context, number))
            offset = data_offset + int(lib.gguf_get_tensor_offset(context, number))
            n_experts = int(shape[2])
            if n_experts < 1 or size < n_experts or size % n_experts or shape[3] != 1:
                raise FlashMoEError(f"{path}: {name} cannot be divided into its experts")
            yield ExpertTensor(name, int(match[1]), match[2], offset, size, n_experts)


def _text(lib: Any, context: int, key: str) -> str:
    """A setting's text; empty where it has none. (To ask for a wrong type ends the process.)"""
    number = lib.gguf_find_key(context, key.encode())
    if number < 0 or lib.gguf_get_kv_type(context, number) != _STRING:
        return ""
    text: bytes = lib.gguf_get_val_str(context, number)
    return text.decode(errors="replace")


def _number(lib: Any, context: int, key: str) -> int:
    """A setting's number, the largest where it has one for each layer; 0 where it has none."""
    number = lib.gguf_find_key(context, key.encode())
    if number < 0:
        return 0
    kind, count = lib.gguf_get_kv_type(context, number), 1
    if kind == _ARRAY:
        kind, count = lib.gguf_get_arr_type(context, number), lib.gguf_get_arr_n(context, number)
        if kind not in _INTEGERS or not count:
            return 0
        address = lib.gguf_get_arr_data(context, number)
    elif kind in _INTEGERS:
        address = lib.gguf_get_val_data(context, number)
    else:
        return 0
    return max(map(int, (_INTEGERS[kind] * count).from_address(address)))
