"""Machine code that is called with the address of its arrays, by whoever has no Python at hand.

A tuple of arrays and numbers, nested or not, becomes a table of words: of an array its address and
its shape. `view` makes the tuple of the table again, in compiled code.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.ccallback import CFunc
from numba.extending import intrinsic, models, register_model
from numba.np.arrayobj import populate_array

from flashmoe.util.machine_code import keep

_WORD = ir.IntType(64)


class At(types.Type):  # type: ignore[misc]
    """The address of a table of words that stands for a tuple of this type."""

    def __init__(self, state: Any) -> None:
        self.state = state
        super().__init__(f"At({state.name})")


@register_model(At)
class _AtModel(models.OpaqueModel):  # type: ignore[misc]
    """A pointer."""


def words_of(state: Any) -> np.ndarray:
    """The table of a tuple's words, int64. Whoever keeps the table keeps the tuple too.

    Raises ValueError for an array whose elements do not lie in C order.
    """
    words: list[int] = []
    _add_words(state, words)
    return np.array(words, np.int64)


def _add_words(value: Any, words: list[int]) -> None:
    if isinstance(value, tuple):
        for part in value:
            _add_words(part, words)
    elif isinstance(value, np.ndarray):
        if not value.flags.c_contiguous:
            raise ValueError("machine code takes arrays in C order")
        words.extend((value.__array_interface__["data"][0], *value.shape))
    elif isinstance(value, float):
        words.append(struct.unpack("q", struct.pack("d", value))[0])
    else:
        words.append(int(value))


@intrinsic
def view(typing_context, at):
    """The tuple whose table of words lies there."""

    def generate(context, builder, signature, arguments):
        words = builder.bitcast(arguments[0], _WORD.as_pointer())
        position = 0

        def word():
            nonlocal position
            address = builder.gep(words, [ir.Constant(_WORD, position)])
            position += 1
            return builder.load(address)

        def array(kind):
            result = context.make_array(kind)(context, builder)
            data = builder.inttoptr(word(), result.data.type)
            shape = [word() for _ in range(kind.ndim)]
            size = context.get_abi_sizeof(context.get_data_type(kind.dtype))
            itemsize = strides = ir.Constant(_WORD, size)
            lengths = []
            for length in reversed(shape):
                lengths.insert(0, strides)
                strides = builder.mul(strides, length)
            populate_array(result, data, shape, lengths, itemsize, meminfo=None)
            return result._getvalue()

        def value(kind):
            if isinstance(kind, types.Array):
                return array(kind)
            if isinstance(kind, types.BaseTuple):
                return context.make_tuple(builder, kind, [value(part) for part in kind.types])
            if isinstance(kind, types.Float):
                return builder.bitcast(word(), ir.DoubleType())
            if isinstance(kind, types.Boolean):
                return cgutils.is_not_null(builder, word())
            return word()

        return value(signature.return_type)

    return at.state(at), generate


@intrinsic
def pointer(typing_context, address):
    """What `numba.carray` takes."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@intrinsic
def call(typing_context, function, arguments):
    """Call the C function at an address with a tuple of words; its result is a word."""

    def generate(context, builder, signature, values):
        words = cgutils.unpack_tuple(builder, values[1])
        kind = ir.FunctionType(_WORD, [_WORD] * len(words))
        return builder.call(builder.inttoptr(values[0], kind.as_pointer()), words)

    return types.int64(types.int64, arguments), generate


def c_function(
    function: Callable[..., Any], state: Any, name: str, sources: tuple[Path, ...], words: int = 0
) -> Any:
    """`function` as a C function: of the address of a state's table, then of so many words.

    It returns a word. state: a tuple as those that it will be called with. name, sources: as for
    `machine_code.keep`.
    """
    return _compiled(function, At(numba.typeof(state)), name, sources, words)


@cache
def _compiled(
    function: Callable[..., Any], state: At, name: str, sources: tuple[Path, ...], words: int
) -> Any:
    kinds = (ctypes.c_void_p, *[ctypes.c_int64] * words)
    compiled: Any = CFunc(function, ((state, *[types.int64] * words), types.int64), {}, {})
    keep(compiled, function, name, sources)
    compiled.compile()
    run = ctypes.CFUNCTYPE(ctypes.c_int64, *kinds)(compiled.address)
    run.address = compiled.address
    run.keep = compiled
    return run
