"""Lets a server of this process take no connection before it may compute."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numba
import numpy as np
from numba import types

from flashmoe.engines.llama.redirect import redirect
from flashmoe.errors import FlashMoEError
from flashmoe.util import libc
from flashmoe.util.by_address import pointer

_NAME = "accept4"
_LOOK_EVERY_MILLISECONDS = 10
_kept: list[object] = []  # machine code that threads of libraries may be in


@contextmanager
def connections_wait(library: Path) -> Iterator[None]:
    """Connections to a server in `library` are taken after the `with` block.

    Raises FlashMoEError where the library takes them in another way than is known.
    """
    held = np.ones(1, np.int64)
    held_at = held.ctypes.data

    @numba.cfunc(types.int32(types.int32, types.intp, types.intp, types.int32))
    def accept(socket, address, length, flags):
        # a `struct pollfd` that waits for the socket's end alone
        ended = np.array([socket, 0], np.int32)
        while numba.carray(pointer(held_at), (1,), np.int64)[0]:
            if libc.poll(ended.ctypes.data, 1, _LOOK_EVERY_MILLISECONDS) > 0:
                break
        return libc.accept(socket, address, length, flags)

    _kept.append((accept, held))
    if not redirect(library, {_NAME: accept.address or 0}):
        raise FlashMoEError(
            f"{library} takes connections in a way that FlashMoE does not know: use another version"
        )
    try:
        yield
    finally:
        held[0] = 0
        original = ctypes.cast(getattr(ctypes.CDLL(None), _NAME), ctypes.c_void_p)
        redirect(library, {_NAME: original.value or 0})
