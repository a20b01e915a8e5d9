"""Reads a file's bytes in machine code: by pread, or by what a test puts in its place."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import CFUNCTYPE, c_char, c_int, c_int64, c_ssize_t, c_void_p, cast, set_errno
from errno import EINTR, EIO
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from flashmoe.util import libc
from flashmoe.util.machine_code import helper

ENDED = -1  # in place of an errno: the file ends too early
_Pread = CFUNCTYPE(c_ssize_t, c_int, c_void_p, c_ssize_t, c_int64, use_errno=True)
in_place_of_pread = np.zeros(1, np.int64)  # an address; 0: libc's own
_kept: list[Any] = []


@intrinsic
def _pread_at(typing_context, address, descriptor, memory, length, offset):
    def generate(context, builder, signature, arguments):
        word, number = ir.IntType(64), ir.IntType(32)
        function = ir.FunctionType(word, [number, word, word, word])
        pointer = builder.inttoptr(arguments[0], function.as_pointer())
        descriptor = builder.trunc(arguments[1], number)
        return builder.call(pointer, [descriptor, *arguments[2:]])

    words = (types.int64,) * 5
    return types.int64(*words), generate


def read_through(preadv: Callable[[int, Any, int], int] | None) -> None:
    """Tests put failing drives here: this reads, as os.preadv does, in place of pread.

    None: pread again.
    """
    if preadv is None:
        in_place_of_pread[0] = 0
        return

    def pread(descriptor: int, address: int, length: int, offset: int) -> int:
        memory = memoryview((c_char * length).from_address(address)).cast("B")
        try:
            return preadv(descriptor, [memory], offset)
        except OSError as error:
            set_errno(error.errno or EIO)
            return -1

    pointer = _Pread(pread)
    _kept.append(pointer)  # a read that has begun may still return to it
    in_place_of_pread[0] = cast(pointer, c_void_p).value or 0


@helper
def read_bytes(instead, descriptor, address, length, needed, offset):
    """Read `needed` bytes and at most `length`: (bytes that came, 0 or why there are no more).

    instead: `in_place_of_pread`.
    """
    done = 0
    while done < needed:
        to, left, at = address + done, length - done, offset + done
        if instead[0]:
            count = _pread_at(instead[0], descriptor, to, left, at)
        else:
            count = libc.pread(descriptor, to, left, at)
        if count == 0:
            return done, ENDED
        if count < 0:
            failure = numba.carray(libc.errno_location(), (1,), np.int32)[0]
            if failure != EINTR:
                return done, failure
        else:
            done += count
    return done, 0
