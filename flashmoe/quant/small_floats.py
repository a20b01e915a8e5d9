"""Reads floats of few bits as the halves that they are a part of, in machine code.

Processors turn halves into float32 by one instruction, the smallest ones too. A table would be
read number by number.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from flashmoe.util.machine_code import helper

# What numbers are multiplied by, so that they are those that the bits stand for.
E2M1_UNIT, E4M3_UNIT, INTEGER_UNIT = 2.0**14, 2.0**8, 2.0**4


@intrinsic
def _half(typing_context, bits):
    """The float32 of a float16 with these bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        low = builder.trunc(arguments[0], ir.IntType(16))
        return builder.fpext(builder.bitcast(low, ir.HalfType()), ir.FloatType())

    return types.float32(bits), generate


@helper
def low_e2m1(byte):
    """Of the low 4 bits of an int32."""
    return _half((byte & 7) << 9 | (byte & 8) << 12)


@helper
def high_e2m1(byte):
    """Of the next 4 bits."""
    return _half((byte & 0x70) << 5 | (byte & 0x80) << 8)


@helper
def low_integer(byte):
    """Of the low 4 bits of an int32, as an integer from 0 to 15: plus 16."""
    return np.int32(byte << 19 & 0x780000 | 0x3F800000).view(np.float32)


@helper
def high_integer(byte):
    """Of the next 4 bits."""
    return np.int32(byte << 15 & 0x780000 | 0x3F800000).view(np.float32)


@helper
def e4m3(byte):
    """Of 8 bits that stand for a number."""
    return _half((byte & 0x7F) << 7 | (byte & 0x80) << 8)


@helper
def small_number(bits):
    """A number from 0 to 2**23, as float32: as the last bits of one above it, which is fast."""
    return np.int32(bits | 0x4B000000).view(np.float32) - np.float32(1 << 23)
