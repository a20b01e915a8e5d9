"""Functions that numba turns into machine code, which is kept on disk.

It lies under ~/.cache/flashmoe, keyed by the sources that it was made from. A process compiles
anew where it can save nothing there, or cannot read what was saved.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache
from numba.core.compiler_lock import global_compiler_lock
from numba.extending import register_jitable

logger = logging.getLogger(__name__)

helper = register_jitable  # marks a function that others may call, compiled or not

# numba's own lock: one thread compiles at a time, or sets numba's folder for compiled code.
compiling = global_compiler_lock
# No thread holds it while the process forks: the child would lack the thread that frees it.
os.register_at_fork(
    before=compiling.acquire,
    after_in_parent=compiling.release,
    after_in_child=compiling.release,
)
# Nor does any when the process ends: LLVM would be taken apart under it, and abort.
atexit.register(compiling.acquire)


class _SavedCode(FunctionCache):  # type: ignore[misc]
    """Compiled code on disk; a full disk or a damaged file costs only the time to compile."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # a cut pickle may raise anything
            logger.debug("%s: compiled anew: %r", self.cache_path, error)
            with suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            logger.debug("%s: not saved: %r", self.cache_path, error)


@cache
def compiled(
    function: Callable[..., Any],
    name: str,
    sources: tuple[Path, ...],
    fastmath: frozenset[str] = frozenset(),
) -> Callable[..., Any]:
    """`function` as machine code, which runs without Python's lock.

    name, sources: as for `keep`. fastmath: what LLVM may do to floating point, by its names.
    """
    made: Any = numba.njit(nogil=True, fastmath=set(fastmath))(function)
    keep(made, function, name, sources)
    return made


def keep(made: Any, function: Callable[..., Any], name: str, sources: Iterable[Path]) -> None:
    """Keep on disk what `made` compiles of `function`, for as long as these sources stay.

    name: begins that of its folder.
    """
    config: Any = numba.config
    with compiling:
        numba_folder = config.CACHE_DIR
        try:
            folder = cache_folder() / "compiled" / f"{name}-{_digest(sources)}"
            folder.mkdir(parents=True, exist_ok=True)
            config.CACHE_DIR = str(folder)
            made._cache = _SavedCode(function)
        except (OSError, RuntimeError) as error:  # no home, or no place to write to
            logger.debug("compiled anew in every process: %s", error)
        finally:
            config.CACHE_DIR = numba_folder


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/flashmoe, by default ~/.cache/flashmoe.

    A relative $XDG_CACHE_HOME does not count, as its specification says. Raises RuntimeError where
    this user has no home.
    """
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    folder = configured if configured.is_absolute() else Path.home() / ".cache"
    if not folder.is_absolute():
        raise RuntimeError(f"the home directory {Path.home()} is a relative path")
    return folder / "flashmoe"


def _digest(sources: Iterable[Path]) -> str:
    """Of sources, and of what compiles them."""
    digest = hashlib.sha256(f"{numba.__version__} {sys.version} {os.uname().machine}".encode())
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]
