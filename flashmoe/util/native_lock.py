"""A lock for threads of Python and for machine code that runs without it."""

from __future__ import annotations

import ctypes
import os

import numpy as np

_RECURSIVE = 1  # PTHREAD_MUTEX_RECURSIVE on Linux
_libc = ctypes.CDLL(None)
for _name in ("lock", "trylock", "unlock", "init"):
    getattr(_libc, f"pthread_mutex_{_name}").argtypes = [ctypes.c_void_p]
_libc.pthread_mutex_init.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
_libc.pthread_mutexattr_settype.argtypes = [ctypes.c_void_p, ctypes.c_int]
_libc.pthread_mutexattr_init.argtypes = [ctypes.c_void_p]


class NativeLock:
    """As threading.RLock; its mutex lies at `address`."""

    def __init__(self) -> None:
        self._mutex = np.zeros(16, np.int64)  # more than any pthread_mutex_t has
        self.address: int = self._mutex.ctypes.data
        self.renew()

    def renew(self) -> None:
        """Begin anew, held by nobody: after a fork, in the child."""
        attributes = (ctypes.c_char * 64)()
        _libc.pthread_mutexattr_init(attributes)
        _libc.pthread_mutexattr_settype(attributes, _RECURSIVE)
        _libc.pthread_mutex_init(self.address, attributes)
        self._process = os.getpid()

    def acquire(self) -> None:
        _libc.pthread_mutex_lock(self.address)

    def try_acquire(self) -> bool:
        """Acquire it if nobody else holds it."""
        return bool(_libc.pthread_mutex_trylock(self.address) == 0)

    def release(self) -> None:
        if os.getpid() == self._process:
            _libc.pthread_mutex_unlock(self.address)
        else:  # a forked child, of which the mutex knows no owner
            self.renew()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()
