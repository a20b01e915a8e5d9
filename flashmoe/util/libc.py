"""Functions of the C library, as machine code calls them on 64-bit Linux.

Addresses are numbers; what a function gives is its own: 0 or -1, an errno, a count.
"""

from __future__ import annotations

from typing import Any

from numba import types

_int, _address, _size, _offset = types.int32, types.intp, types.intp, types.int64


def _function(name: str, result: Any, *arguments: Any) -> Any:
    return types.ExternalFunction(name, result(*arguments))


errno_location = _function("__errno_location", types.voidptr)

lock = _function("pthread_mutex_lock", _int, _address)
try_lock = _function("pthread_mutex_trylock", _int, _address)
unlock = _function("pthread_mutex_unlock", _int, _address)
signal = _function("pthread_cond_signal", _int, _address)
broadcast = _function("pthread_cond_broadcast", _int, _address)
wait = _function("pthread_cond_wait", _int, _address, _address)
timed_wait = _function("pthread_cond_timedwait", _int, _address, _address, _address)
clock = _function("clock_gettime", _int, _int, _address)

pread = _function("pread", _size, _int, _address, _size, _offset)
status_of = _function("fstat", _int, _int, _address)
advise_file = _function("posix_fadvise", _int, _int, _offset, _offset, _int)

move_pages = _function("mremap", _address, _address, _size, _size, _int, _address)
advise_pages = _function("madvise", _int, _address, _size, _int)

accept = _function("accept4", _int, _int, _address, _address, _int)
poll = _function("poll", _int, _address, types.uint64, _int)
