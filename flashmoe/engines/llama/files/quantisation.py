"""Which of ggml's types each tensor of a file gets, and its values in that type."""

from __future__ import annotations

import ctypes
import importlib.util
import re
from ctypes import c_int, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

from flashmoe.errors import FlashMoEError

_FLOATS = (Kind.F32, Kind.F16, Kind.BF16)
_BY_GGUF = (Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.MXFP4)
# gguf-py reads these but does not write them; other types want measured importances of weights
_BY_GGML = (
    Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.IQ3_XXS, Kind.IQ3_S, Kind.IQ4_NL,
    Kind.IQ4_XS,
)  # fmt: skip
KINDS = {kind.name.lower(): kind for kind in (*_FLOATS, *_BY_GGUF, *_BY_GGML)}
# What llama-quantize takes where a row is no multiple of a type's block.
_FALLBACKS = {
    Kind.Q2_K: Kind.Q4_0, Kind.Q3_K: Kind.Q4_0, Kind.Q4_K: Kind.Q5_0, Kind.Q5_K: Kind.Q5_1,
    Kind.Q6_K: Kind.Q8_0, Kind.IQ3_XXS: Kind.IQ4_NL, Kind.IQ3_S: Kind.IQ4_NL,
    Kind.IQ4_XS: Kind.IQ4_NL,
}  # fmt: skip
_LIBRARIES = (("xllamacpp", "xllamacpp*.so"), ("llama_cpp", "lib/libggml-base.so"))
# In llama-quantize's mixes, where eight experts make the attention a small part of the file.
_BESIDE_EIGHT = {"attn_k": Kind.Q8_0, "attn_v": Kind.Q8_0, "attn_output": Kind.Q5_K}
_TURN = {"gate": 0, "gate_up": 0, "up": 1, "down": 2}


@dataclass(frozen=True)
class Recipe:
    """The types of a file's tensors. Vectors and routers are float32 in every file."""

    experts: tuple[Kind, ...]  # in turn, over layers and within them over gate, up and down
    dense: Kind
    output: Kind
    more: Kind | None = None  # of the layers that llama-quantize gives more bits

    def kind(
        self, name: str, shape: tuple[int, ...], layers: int, n_experts: int, *, vectors: bool
    ) -> Kind:
        """Of a tensor by its name in the file and its shape; vectors: each expert has only one."""
        if vectors or len(shape) == 1 or "ffn_gate_inp" in name:
            return Kind.F32
        wanted = self._wanted(name, layers, n_experts)
        for kind in (wanted, _FALLBACKS.get(wanted, wanted)):
            if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0:
                return kind
        return Kind.F16

    def _wanted(self, name: str, layers: int, n_experts: int) -> Kind:
        if name == "output.weight":
            return self.output
        found = re.match(r"blk\.(\d+)\.(\w+)\.", name)
        if not found:
            return self.dense
        layer, part = int(found[1]), found[2]
        if self.more and n_experts == 8 and part in _BESIDE_EIGHT:
            return _BESIDE_EIGHT[part]
        is_sensitive = part == "attn_v" or part.startswith("ffn_down")
        if self.more and is_sensitive and _has_more_bits(layer, layers):
            return self.more
        if not part.endswith("_exps"):
            return self.dense
        turn = layer + _TURN[part.removeprefix("ffn_").removesuffix("_exps")]
        return self.experts[turn % len(self.experts)]


def _has_more_bits(layer: int, layers: int) -> bool:
    """As llama-quantize has it: the first and last layers, and every third between them."""
    first, last = layers // 8, 7 * layers // 8
    return layer < first or layer >= last or (layer - first) % 3 == 2


# Under the names that llama-quantize has for them.
_MIXES = {
    "q4_k_m": Recipe((Kind.Q4_K,), Kind.Q4_K, Kind.Q6_K, Kind.Q6_K),
    "q5_k_m": Recipe((Kind.Q5_K,), Kind.Q5_K, Kind.Q6_K, Kind.Q6_K),
    "mxfp4_moe": Recipe((Kind.MXFP4,), Kind.Q8_0, Kind.Q8_0),
}


def recipe(name: str) -> Recipe:
    """By a type's name, as "q4_0": experts have it, and the rest is bfloat16.

    By several, as "q4_k,q6_k": experts' tensors have them in turn. By a mix of llama-quantize, as
    "q4_k_m": all have what that gives them. Raises FlashMoEError for an unknown name.
    """
    if name in _MIXES:
        return _MIXES[name]
    words = name.split(",")
    unknown = [word for word in words if word not in KINDS]
    if unknown:
        raise FlashMoEError(
            f"no GGUF quantisation is called {unknown[0]!r}: choose from "
            f"{', '.join((*KINDS, *_MIXES))}, or several types with commas between them"
        )
    kinds = tuple(KINDS[word] for word in words)
    dense = kinds[0] if len(kinds) == 1 and kinds[0] in _FLOATS else Kind.BF16
    return Recipe(kinds, dense, dense)


def check(kinds: set[Kind]) -> None:
    """Raises FlashMoEError where nothing that is installed writes one of these types."""
    for kind in sorted(kinds & set(_BY_GGML)):
        if _quantise_chunk() is None:
            raise FlashMoEError(
                f"{kind.name} is written by llama.cpp's own code, and no package with it is "
                "installed: pip install xllamacpp"
            )


def size_bytes(shape: tuple[int, ...], kind: Kind) -> int:
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(shape, dtype=np.int64)) // block * int(block_bytes)


def encode(tensor: torch.Tensor, kind: Kind) -> np.ndarray:
    """The values in `kind`, as uint8; a block lies within a row. Thread-safe."""
    if kind in _FLOATS:
        dtype = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}[kind]
        values = tensor.to(dtype).contiguous().reshape(-1)
        raw: np.ndarray = values.view(torch.uint8).numpy()
        return raw
    floats = tensor.float().contiguous().numpy()
    quantise = _quantise_chunk()
    if quantise is None:
        return np.asarray(gguf.quants.quantize(floats, kind)).reshape(-1)
    width = floats.shape[-1]
    out = np.empty(size_bytes(floats.shape, kind), np.uint8)
    quantise(kind, floats.ctypes.data, out.ctypes.data, 0, floats.size // width, width, None)
    return out


@cache
def _quantise_chunk() -> Any:
    """ggml_quantize_chunk of a library that is installed; None without one."""
    for package, pattern in _LIBRARIES:
        found = importlib.util.find_spec(package)
        for path in (
            sorted(Path(found.origin).parent.glob(pattern)) if found and found.origin else ()
        ):
            try:
                function = ctypes.CDLL(str(path)).ggml_quantize_chunk
            except (OSError, AttributeError):
                continue
            function.restype = c_size_t
            function.argtypes = [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]
            return function
    return None
