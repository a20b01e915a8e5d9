"""What stands at the beginning of a GGUF file, as the program's own reader finds it."""

from __future__ import annotations

import ctypes
from ctypes import addressof, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path

from flashmoe.engines.llama.ggml import GGML, GGUFParameters
from flashmoe.errors import FlashMoEError

_UINT32, _STRING = 4, 8  # types of values


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
    architecture: str
    top_k: int  # 0 in a later part of a split file, which has no settings
    tensors: tuple[TensorPlace, ...]


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
    gguf = lib.gguf_init_from_file(str(path).encode(), GGUFParameters(True, addressof(tensors)))
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
        return GGUFHead(architecture, top_k, tuple(places))
    finally:
        lib.gguf_free(gguf)
        lib.ggml_free(tensors)


def _find(lib: ctypes.CDLL, gguf: int, key: str, kind: int) -> int:
    """The number of a key with such a value; -1 for none. The library aborts at another kind."""
    number = c_int32(lib.gguf_find_key(gguf, key.encode())).value  # an int in forks
    return number if number >= 0 and lib.gguf_get_kv_type(gguf, number) == kind else -1


def _text(lib: ctypes.CDLL, gguf: int, key: str) -> str:
    number = _find(lib, gguf, key, _STRING)
    return lib.gguf_get_val_str(gguf, number).decode(errors="replace") if number >= 0 else ""


def _number(lib: ctypes.CDLL, gguf: int, key: str) -> int:
    number = _find(lib, gguf, key, _UINT32)
    return int(lib.gguf_get_val_u32(gguf, number)) if number >= 0 else 0
