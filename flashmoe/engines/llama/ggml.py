"""A loaded llama.cpp's own functions, and where its tensors keep what we look at."""

from __future__ import annotations

import ctypes
import math
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from dataclasses import dataclass

import numpy as np

from flashmoe.errors import FlashMoEError

_PROBE = b"flashmoe-probe"
_FLOAT32, _INT32 = 0, 26  # as a tensor's first field says


class _InitParameters(ctypes.Structure):
    _fields_ = [("size", c_size_t), ("buffer", c_void_p), ("no_alloc", c_bool)]


class GGUFParameters(ctypes.Structure):
    _fields_ = [("no_alloc", c_bool), ("context", c_void_p)]


_SIGNATURES = {
    "ggml_init": (c_void_p, [_InitParameters]),
    "ggml_free": (None, [c_void_p]),
    "ggml_new_tensor_4d": (c_void_p, [c_void_p, c_int, c_int64, c_int64, c_int64, c_int64]),
    "ggml_mul_mat_id": (c_void_p, [c_void_p, c_void_p, c_void_p, c_void_p]),
    "ggml_set_name": (c_void_p, [c_void_p, c_char_p]),
    "ggml_get_data": (c_void_p, [c_void_p]),
    "ggml_get_tensor": (c_void_p, [c_void_p, c_char_p]),
    "ggml_nbytes": (c_size_t, [c_void_p]),
    "ggml_type_size": (c_size_t, [c_int]),
    "ggml_type_name": (c_char_p, [c_int]),
    "ggml_validate_row_data": (c_bool, [c_int, c_void_p, c_size_t]),
    "ggml_tensor_overhead": (c_size_t, []),
    "ggml_backend_tensor_get": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "gguf_init_from_file": (c_void_p, [c_char_p, GGUFParameters]),
    "gguf_free": (None, [c_void_p]),
    "gguf_get_data_offset": (c_size_t, [c_void_p]),
    "gguf_get_n_tensors": (c_int64, [c_void_p]),
    "gguf_get_tensor_name": (c_char_p, [c_void_p, c_int64]),
    "gguf_get_tensor_offset": (c_size_t, [c_void_p, c_int64]),
    "gguf_get_tensor_type": (c_int, [c_void_p, c_int64]),
    "gguf_find_key": (c_int64, [c_void_p, c_char_p]),
    "gguf_get_kv_type": (c_int, [c_void_p, c_int64]),
    "gguf_get_arr_type": (c_int, [c_void_p, c_int64]),
    "gguf_get_arr_n": (c_size_t, [c_void_p, c_int64]),
    "gguf_get_arr_data": (c_void_p, [c_void_p, c_int64]),
    "gguf_get_val_data": (c_void_p, [c_void_p, c_int64]),
    "gguf_get_val_str": (c_char_p, [c_void_p, c_int64]),
}


@dataclass(frozen=True)
class TensorLayout:
    """Offsets in `struct ggml_tensor`, which differ between versions and forks."""

    shape: int  # int64 [4], the fastest dimension first
    strides: int  # size_t [4], bytes
    sources: int  # pointers: of a product by experts, their weights, the input, their ids
    data: int  # a pointer
    name: int


class GGML:
    """The tensor library under a llama.cpp that is loaded into this process."""

    def __init__(self, path: str) -> None:
        """Raises FlashMoEError where it lacks a function, or its tensors are not understood."""
        self.library = ctypes.CDLL(path)
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self.library, name, None)
            if function is None:
                raise FlashMoEError(f"{path} has no {name}: FlashMoE needs a newer llama.cpp")
            function.restype, function.argtypes = result, arguments
        # short calls keep Python's lock: to take it again costs more than they do
        self._get = ctypes.PyDLL(path).ggml_backend_tensor_get
        self._get.argtypes = [c_void_p, c_void_p, c_size_t, c_size_t]
        self.layout = self._probe(path)

    def _probe(self, path: str) -> TensorLayout:
        """Find each field in the bytes of tensors whose content we know."""
        lib, float32, int32 = self.library, _FLOAT32, _INT32
        context = lib.ggml_init(_InitParameters(1 << 20, None, False))
        try:
            tensor = lib.ggml_new_tensor_4d(context, float32, 7, 11, 13, 17)
            lib.ggml_set_name(tensor, _PROBE)
            size = min(lib.ggml_tensor_overhead(), 400)
            raw = ctypes.string_at(tensor, size)
            weights = lib.ggml_new_tensor_4d(context, float32, 8, 4, 3, 1)
            x = lib.ggml_new_tensor_4d(context, float32, 8, 1, 5, 1)
            ids = lib.ggml_new_tensor_4d(context, int32, 2, 5, 1, 1)
            if c_int.from_address(ids).value != int32:
                raise ValueError
            product = ctypes.string_at(lib.ggml_mul_mat_id(context, weights, x, ids), size)
            return TensorLayout(
                shape=raw.index(_words(7, 11, 13, 17)),
                strides=raw.index(_words(4, 28, 308, 4004)),
                sources=product.index(_words(weights, x, ids)),
                data=raw.index(_words(lib.ggml_get_data(tensor))),
                name=raw.index(_PROBE + b"\0"),
            )
        except ValueError:
            raise FlashMoEError(
                f"{path} lays out its tensors in a way that FlashMoE does not understand: report "
                "the version of llama.cpp"
            ) from None
        finally:
            lib.ggml_free(context)

    def address_of(self, name: str) -> int:
        """Where one of its functions lies."""
        return ctypes.cast(getattr(self.library, name), c_void_p).value or 0

    def name_of(self, tensor: int) -> str:
        return ctypes.string_at(tensor + self.layout.name).decode(errors="replace")

    def type_name(self, kind: int) -> str:
        """Of a tensor's format, in lower case: q4_k."""
        name: bytes = self.library.ggml_type_name(kind)
        return name.decode().lower()

    def shape_of(self, tensor: int) -> tuple[int, int]:
        """(rows, elements of each) of a matrix, or of all rows of a tensor."""
        first, *others = (c_int64 * 4).from_address(tensor + self.layout.shape)
        return math.prod(others), first

    def float_rows(self, tensor: int, most: int) -> np.ndarray:
        """The last rows, at most so many, of a float32 matrix: [rows, elements], copied."""
        rows, elements = self.shape_of(tensor)
        count = min(rows, most)
        values = np.empty((count, elements), np.float32)
        offset = 4 * elements * (rows - count)
        self._get(tensor, values.ctypes.data, offset, values.nbytes)
        return values

    def int_rows(self, tensor: int) -> np.ndarray:
        """All rows of an int32 matrix, wherever its memory is: [rows, elements] int64."""
        rows, elements = self.shape_of(tensor)
        if not rows:
            return np.empty((0, elements), np.int64)
        stride = c_size_t.from_address(tensor + self.layout.strides + 8).value
        span = stride * (rows - 1) + 4 * elements
        raw = np.empty(span // 4, np.int32)
        self._get(tensor, raw.ctypes.data, 0, span)
        if rows > 1:
            raw = np.lib.stride_tricks.as_strided(raw, (rows, elements), (stride, 4))
        return raw.astype(np.int64).reshape(rows, elements)

    def floats(self, tensor: int, *, copy: bool = True) -> np.ndarray | None:
        """All of a contiguous float32 tensor, [rows, elements]; None: it is another.

        copy: wherever its memory is; else as the tensor has it, which must be in the host's.
        """
        rows, elements = self.shape_of(tensor)
        row_bytes = c_size_t.from_address(tensor + self.layout.strides + 8).value
        is_float32 = c_int.from_address(tensor).value == _FLOAT32
        if not is_float32 or row_bytes != 4 * elements:
            return None
        if copy:
            return self.float_rows(tensor, rows)
        values = (ctypes.c_float * (rows * elements)).from_address(self.data_of(tensor))
        return np.ctypeslib.as_array(values).reshape(rows, elements)

    def data_of(self, tensor: int) -> int:
        return c_void_p.from_address(tensor + self.layout.data).value or 0

    def source_of(self, tensor: int, number: int) -> int:
        """The address of a tensor's n-th source, 0 where it has none."""
        return c_void_p.from_address(tensor + self.layout.sources + 8 * number).value or 0


def _words(*values: int) -> bytes:
    return b"".join(value.to_bytes(8, "little") for value in values)
