"""Machine code in place of functions that llama.cpp imports.

A program may keep Python's lock while its own threads load a model, so what runs then must not
need Python: these functions are compiled, and call Python only where `Switches` allows it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import CFUNCTYPE, c_bool, c_int, c_long, c_size_t, c_void_p
from typing import Any

import numba
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from flashmoe.engines.llama.ggml import GGML
from flashmoe.residency.at_once_work import PART, READY
from flashmoe.util import libc
from flashmoe.util.by_address import call, pointer
from flashmoe.util.native_lock import NativeLock

_MOST_FILES = 1024  # parts of split models
# Positions in `Switches`. DECODE: the address of `decode_event.decode`, 0 without; TABLE: its
# first argument; ANSWER: what it gave for the event of which Python is told next. AWAITED: 1 + the
# number of a layer of which late reads are on their way, until they must be there. ENDED: whatever
# is still to be computed fails.
ON, FAILED, CHECKING, PYTHON, ASIDE, DECODE, TABLE, ANSWER, AWAITED, ENDED = range(10)
_DEVICE, _INODE, _BASE, _SIZE = 0, 1, 2, 3  # columns of the table of files
_CHOICE = tuple(b"ffn_moe_topk-\0")
_MOST_NAME = 64  # bytes
_MOST_LAYERS = 1024
_REPACKING = tuple(b"ggml_backend_dev_get_extra_bufts\0")
_STATUS_BYTES = 256  # more than any `struct stat` has

_Callback = CFUNCTYPE(c_bool, c_void_p, c_bool, c_void_p)
_Prepare = CFUNCTYPE(c_void_p, c_int, use_errno=True)
_Decide = CFUNCTYPE(None)


@intrinsic
def _address(typing_context, pointer):
    def generate(context, builder, signature, arguments):
        return builder.ptrtoint(arguments[0], cgutils.intp_t)

    return types.uint64(types.voidptr), generate


class Hooks:
    """The functions, their switches, and the files whose mapping they answer."""

    def __init__(
        self,
        ggml: GGML,
        observe: Callable[[int, bool], bool],
        prepare: Callable[[int], int],
        decide: Callable[[], None],
    ) -> None:
        """observe: (tensor, asked before it is computed) -> shall it be observed, or go on.

        prepare: (file descriptor) -> the address to give out for its mapping; 0: the file's own.
            What it gives ctypes.set_errno, the caller of mmap finds in errno.
        decide: called when a model is about to be loaded, to set ASIDE where it needs no cache.
        """
        self.switches = np.zeros(10, np.int64)
        self.switches[[ON, PYTHON]] = 1
        self.computing = NativeLock()  # held while a graph is computed
        self._files = np.zeros((_MOST_FILES, 4), np.uint64)
        self._count = np.zeros(1, np.int64)
        self._status = np.zeros(_STATUS_BYTES // 8, np.uint64)
        self._down_input = np.zeros(_MOST_NAME, np.uint8)  # the start of a name
        self._downs = np.zeros(_MOST_LAYERS, np.int64)  # where `down` weights lie, by layer
        self._python = (
            _Callback(lambda tensor, ask, _: observe(tensor, ask)),
            _Prepare(lambda descriptor: prepare(descriptor)),
            _Decide(lambda: decide()),
        )
        self._ggml = ggml
        self._compiled = _compile(self, ggml, *self._python)

    def add_file(self, device: int, inode: int, base: int, size_bytes: int) -> None:
        """Answer the mapping of this file with `base` from now on."""
        row = int(self._count[0])
        self._files[row] = device, inode, base, size_bytes
        self._count[0] = row + 1

    def end(self) -> None:
        """Let the graph at hand end, and fail all later ones: none needs Python any more."""
        with self.computing:
            self.switches[ENDED] = 1

    def await_apart(self, down_input: str, downs: dict[int, int]) -> bool:
        """Let late reads of a layer end while its other products are computed; can that be?

        They are awaited after the node `down_input`N, or before a product by what lies at the
        address downs[N]; N: the layer's number.
        """
        name = down_input.encode()
        if not 0 < len(name) < _MOST_NAME - 4 or max(downs, default=0) >= _MOST_LAYERS:
            return False
        self._down_input[: len(name)] = list(name)
        self._downs[list(downs)] = list(downs.values())
        return True

    @property
    def addresses(self) -> dict[str, int]:
        """By the name of the import that each replaces."""
        return {name: function.address for name, function in self._compiled.items()}

    @property
    def originals(self) -> dict[str, int]:
        """What the same imports are without us."""
        libraries = (ctypes.CDLL(None), self._ggml.library)
        return {
            name: ctypes.cast(getattr(library, name), c_void_p).value or 0
            for name in self._compiled
            for library in libraries
            if hasattr(library, name)
        }


def _compile(hooks: Hooks, ggml: GGML, observe: Any, prepare: Any, decide: Any) -> dict[str, Any]:
    system, lib = ctypes.CDLL(None), ggml.library

    def address_of(function: Any) -> int:
        return ctypes.cast(function, c_void_p).value or 0

    def original(library: Any, name: str, result: Any, *arguments: Any) -> Any:
        return CFUNCTYPE(result, *arguments)(address_of(getattr(library, name)))

    map_file = original(system, "mmap", c_void_p, c_void_p, c_size_t, c_int, c_int, c_int, c_long)
    unmap = original(system, "munmap", c_int, c_void_p, c_size_t)
    lock = original(system, "mlock", c_int, c_void_p, c_size_t)
    status_of = original(system, "fstat", c_int, c_int, c_void_p)
    set_callback = original(
        lib, "ggml_backend_sched_set_eval_callback", None, c_void_p, c_void_p, c_void_p
    )
    compute = original(lib, "ggml_backend_sched_graph_compute_async", c_int, c_void_p, c_void_p)
    functions: dict[str, Any] = {}
    python_observe = CFUNCTYPE(c_bool, c_void_p, c_bool, c_void_p)(address_of(observe))
    python_prepare = CFUNCTYPE(c_void_p, c_int)(address_of(prepare))
    python_decide = CFUNCTYPE(None)(address_of(decide))
    switches_at = np.uint64(hooks.switches.ctypes.data)
    files_at = np.uint64(hooks._files.ctypes.data)
    count_at = np.uint64(hooks._count.ctypes.data)
    status_at = np.uint64(hooks._status.ctypes.data)
    down_input_at = np.uint64(hooks._down_input.ctypes.data)
    downs_at = np.uint64(hooks._downs.ctypes.data)
    name_at = np.uint64(ggml.layout.name)
    computing_at = hooks.computing.address
    sources_at, data_at = np.uint64(ggml.layout.sources), np.uint64(ggml.layout.data)
    void = types.voidptr

    @numba.njit
    def switches():
        return numba.carray(pointer(switches_at), (10,), np.int64)

    @numba.njit
    def files():
        count = numba.carray(pointer(count_at), (1,), np.int64)[0]
        return numba.carray(pointer(files_at), (_MOST_FILES, 4), np.uint64)[:count]

    @numba.njit
    def is_ours(pointer):
        address = _address(pointer)
        for row in files():  # noqa: SIM110  (numba compiles no generator here)
            if row[_BASE] <= address < row[_BASE] + row[_SIZE]:
                return True
        return False

    @numba.njit
    def number_of(name, start):
        """The number with which a name goes on after `start`, that ends with 0; -1: it does not."""
        i = 0
        while start[i] != 0:
            if name[i] != start[i]:
                return -1
            i += 1
        number = 0
        while i < _MOST_NAME and 48 <= name[i] <= 57:
            number = 10 * number + name[i] - 48
            i += 1
        return number

    @numba.njit
    def down_input():
        return numba.carray(pointer(down_input_at), (_MOST_NAME,), np.uint8)

    @numba.njit
    def multiplies_by_down(tensor, number):
        source = numba.carray(pointer(_address(tensor) + sources_at), (1,), np.uint64)[0]
        if source == 0:
            return False
        downs = numba.carray(pointer(downs_at), (_MOST_LAYERS,), np.int64)
        return numba.carray(pointer(source + data_at), (1,), np.int64)[0] == downs[number]

    @numba.njit
    def shall_await(tensor, ask, name, number):
        """Late reads of layer `number` must be there before the next node is computed."""
        if ask:  # the node that was to be asked for did not come
            return multiplies_by_down(tensor, number)
        return number_of(name, down_input()) == number

    @numba.cfunc(types.boolean(void, types.boolean, void))
    def observed(tensor, ask, user):
        state = switches()
        if state[ON] == 0:
            return not ask
        if state[CHECKING] != 0:
            return python_observe(tensor, ask, user)
        name = numba.carray(pointer(_address(tensor) + name_at), (_MOST_NAME,), np.uint8)
        awaited = state[AWAITED] - 1
        if awaited >= 0 and shall_await(tensor, ask, name, awaited):
            state[ANSWER] = call(state[DECODE], (state[TABLE], awaited, 0))
            if state[ANSWER] != READY:
                return python_observe(tensor, ask, user)
            state[AWAITED] = 0
            return not ask
        number = number_of(name, _CHOICE)
        if ask:
            return number >= 0 or (awaited >= 0 and number_of(name, down_input()) == awaited)
        if number < 0:
            return True
        state[ANSWER] = state[AWAITED] = 0
        if state[DECODE] != 0:
            state[ANSWER] = call(state[DECODE], (state[TABLE], number, _address(tensor)))
            if state[ANSWER] == PART:
                state[AWAITED] = number + 1
            if state[ANSWER] == PART or state[ANSWER] == READY:
                return True
        return python_observe(tensor, ask, user)

    callback_at = np.uint64(observed.address or 0)
    functions["observed"] = observed

    @numba.cfunc(void(void, types.uint64, types.int32, types.int32, types.int32, types.int64))
    def map_ours(address, length, protection, flags, descriptor, offset):
        if descriptor >= 0 and protection == 1 and offset == 0 and switches()[ASIDE] == 0:
            status = numba.carray(pointer(status_at), (2,), np.uint64)
            if status_of(descriptor, pointer(status_at)) == 0:
                for row in files():
                    if row[_DEVICE] == status[0] and row[_INODE] == status[1]:
                        return pointer(row[_BASE])
            if switches()[PYTHON] != 0:
                ours = python_prepare(descriptor)
                if _address(ours) != np.uint64(0):
                    return ours
        return map_file(address, length, protection, flags, descriptor, offset)

    @numba.cfunc(types.int32(void, types.uint64))
    def unmap_others(address, length):
        return types.int32(0) if is_ours(address) else unmap(address, length)

    @numba.cfunc(types.int32(void, types.uint64))
    def lock_others(address, length):
        return types.int32(0) if is_ours(address) else lock(address, length)

    @numba.cfunc(types.void(void, void, void))
    def set_ours(scheduler, function, user):
        if switches()[ASIDE] != 0:
            set_callback(scheduler, function, user)
        else:
            set_callback(scheduler, pointer(callback_at), pointer(np.uint64(0)))

    @numba.cfunc(types.int32(void, void))
    def compute_or_fail(scheduler, graph):
        state = switches()
        if state[ASIDE] != 0:
            return compute(scheduler, graph)
        libc.lock(computing_at)
        result = types.int32(-1)
        if state[ENDED] == 0:
            result = compute(scheduler, graph)
        if state[FAILED] != 0:
            state[FAILED] = 0
            result = types.int32(-1)
        libc.unlock(computing_at)
        return result

    functions |= {"mmap": map_ours, "mmap64": map_ours, "munmap": unmap_others}
    functions |= {"mlock": lock_others, "ggml_backend_sched_set_eval_callback": set_ours}
    functions["ggml_backend_sched_graph_compute_async"] = compute_or_fail
    if hasattr(lib, "ggml_backend_reg_get_proc_address"):  # forks without have no such buffers
        ask_registry = original(
            lib, "ggml_backend_reg_get_proc_address", c_void_p, c_void_p, c_void_p
        )

        @numba.cfunc(void(void, void))
        def no_repacking(registry, name):
            text = numba.carray(name, (len(_REPACKING),), np.uint8)
            for i in range(len(_REPACKING)):
                if text[i] != _REPACKING[i]:
                    return ask_registry(registry, name)
            if switches()[PYTHON] != 0:
                python_decide()
            if switches()[ASIDE] != 0:
                return ask_registry(registry, name)
            return pointer(np.uint64(0))

        functions["ggml_backend_reg_get_proc_address"] = no_repacking
    hooks._originals = (map_file, unmap, lock, status_of, set_callback, compute)  # type: ignore[attr-defined]
    return functions
