"""What stands at the beginning of a GGUF file, as the program's own reader finds it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from ctypes import addressof, c_int32, c_int64, c_uint32, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashmoe.engines.llama.ggml import GGML, GGUFParameters
from flashmoe.errors import FlashMoEError

_STRING, _ARRAY = 8, 9  # types of settings
# Settings of a model that are numbers, without the architecture's name before them.
_SIZES = (
    "context_length", "block_count", "embedding_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.sliding_window", "attention.kv_lora_rank", "rope.dimension_count",
)  # fmt: skip
_INTEGERS = {
    0: ctypes.c_uint8, 1: ctypes.c_int8, 2: ctypes.c_uint16, 3: ctypes.c_int16,
    4: ctypes.c_uint32, 5: ctypes.c_int32, 10: ctypes.c_uint64, 11: ctypes.c_int64,
}  # fmt: skip


@dataclass(frozen=True)
class TensorPlace:
    """A tensor's bytes in a file."""

    name: str
    kind: int  # the library's number of its format
    shape: tuple[int, ...]  # four sizes, the fastest dimension first
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True)
class GGUFHead:
    """Settings and tensors of one file, which may be a part of a split one."""

    architecture: str
    top_k: int  # of the layer with the most; 0 without experts, and in a split file's later parts
    tensors: tuple[TensorPlace, ...]
    part: int  # of a split file
    parts: int
    sizes: Mapping[str, int]
    """Of `_SIZES`, the largest where layers differ; 0 where the file does not say."""


def read_head(ggml: GGML, path: Path) -> GGUFHead | None:
    """The head of `path`; None for a file that the library's reader does not take.

    Raises FlashMoEError for a file that cannot be opened.
    """
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                return None
    except OSError as error:
        raise FlashMoEError(f"{path} cannot be read ({error.strerror})") from None
    lib, tensors = ggml.library, c_void_p()
    gguf = lib.gguf_init_from_file(os.fsencode(path), GGUFParameters(True, addressof(tensors)))
    if not gguf:
        return None
    try:
        architecture = _text(lib, gguf, "general.architecture")
        top_k = _number(lib, gguf, f"{architecture}.expert_used_count")
        data_offset = lib.gguf_get_data_offset(gguf)
        places = []
        for number in range(lib.gguf_get_n_tensors(gguf)):
            name = lib.gguf_get_tensor_name(gguf, number)
            tensor = lib.ggml_get_tensor(tensors, name)
            places.append(
                TensorPlace(
                    name.decode(errors="replace"),
                    int(lib.gguf_get_tensor_type(gguf, number)),
                    tuple((c_int64 * 4).from_address(tensor + ggml.layout.shape)),
                    data_offset + int(lib.gguf_get_tensor_offset(gguf, number)),
                    int(lib.ggml_nbytes(tensor)),
                )
            )
        return GGUFHead(
            architecture,
            top_k,
            tuple(places),
            _number(lib, gguf, "split.no"),
            max(_number(lib, gguf, "split.count"), 1),
            {name: _number(lib, gguf, f"{architecture}.{name}") for name in _SIZES},
        )
    finally:
        lib.gguf_free(gguf)
        lib.ggml_free(tensors)


def _find(lib: Any, gguf: int, key: str) -> int:
    return c_int32(lib.gguf_find_key(gguf, key.encode())).value  # an int in forks


def _text(lib: Any, gguf: int, key: str) -> str:
    """A setting's text; empty where it has none. (To ask for a wrong type ends the process.)"""
    number = _find(lib, gguf, key)
    if number < 0 or lib.gguf_get_kv_type(gguf, number) != _STRING:
        return ""
    text: bytes = lib.gguf_get_val_str(gguf, number)
    return text.decode(errors="replace")


def _number(lib: Any, gguf: int, key: str) -> int:
    """A setting's number, the largest where it has one for each layer; 0 where it has none."""
    number = _find(lib, gguf, key)
    if number < 0:
        return 0
    kind, count = lib.gguf_get_kv_type(gguf, number), 1
    if kind == _ARRAY:
        kind = lib.gguf_get_arr_type(gguf, number)
        count = c_uint32(lib.gguf_get_arr_n(gguf, number)).value
        if kind not in _INTEGERS or not count:
            return 0
        address = lib.gguf_get_arr_data(gguf, number)
    elif kind in _INTEGERS:
        address = lib.gguf_get_val_data(gguf, number)
    else:
        return 0
    return max(map(int, (_INTEGERS[kind] * count).from_address(address)))
