"""A lock for threads of Python and for machine code that runs without it."""

from __future__ import annotations

import ctypes
import threading

import numpy as np

_libc = ctypes.CDLL(None)
for _name in ("pthread_mutex_lock", "pthread_mutex_unlock"):
    getattr(_libc, _name).argtypes = [ctypes.c_void_p]


class NativeLock:
    """As threading.RLock; machine code takes the mutex at `address`, once at a time."""

    def __init__(self) -> None:
        self._mutex = np.zeros(8, np.int64)  # as PTHREAD_MUTEX_INITIALIZER
        self.address: int = self._mutex.__array_interface__["data"][0]
        self._lock = threading.RLock()
        self._depth = 0

    def acquire(self) -> None:
        self._lock.acquire()
        if self._depth == 0:
            _libc.pthread_mutex_lock(self.address)
        self._depth += 1

    def release(self) -> None:
        self._depth -= 1
        if self._depth == 0:
            _libc.pthread_mutex_unlock(self.address)
        self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()
