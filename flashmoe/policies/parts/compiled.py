"""Compiles policies: the same classes that run as plain Python become machine code by numba.

A policy is an ordinary class whose state lies in NumPy arrays. `state_of` makes a named tuple of
these arrays, which numba passes by reference, so that compiled `touch` and `victim` change the
arrays of the policy object itself.

Compiled code is saved under ~/.cache/flashmoe, keyed by the sources that it was made from. A
process compiles anew where it can save nothing there, or cannot read what was saved.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
import sys
import threading
from collections import namedtuple
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache
from numba.extending import overload, register_jitable

logger = logging.getLogger(__name__)

# numba's folder for compiled code is one setting of the process: threads must not set it at once.
_compiling = threading.Lock()
# No thread holds the lock while the process forks: the child would lack the thread that frees it.
os.register_at_fork(
    before=_compiling.acquire,
    after_in_parent=_compiling.release,
    after_in_child=_compiling.release,
)
# The sources of every policy's compiled code, relative to the package.
SHARED_SOURCES = (
    "events.py",
    "cache/serving.py",
    "policies/base.py",
    "policies/parts/*.py",
    "util/libc.py",
)
helper = register_jitable  # marks a function that policies may call, compiled or not


def touch(policy, event, now):
    """policy.touch, callable from compiled code on what `state_of` returns."""
    policy.touch(event, now)


def victim(policy, candidates):
    """policy.victim, callable from compiled code on what `state_of` returns."""
    return policy.victim(candidates)


@overload(touch, strict=False)  # a method calls its first argument `self`
def _touch(policy, event, now):
    return policy.instance_class.policy_class.touch


@overload(victim, strict=False)
def _victim(policy, candidates):
    return policy.instance_class.policy_class.victim


@cache
def _state_class(policy_class: type, fields: tuple[str, ...]) -> Any:
    name = f"{policy_class.__name__}State"
    make: Any = namedtuple  # mypy rejects field names that it cannot see
    state_class = make(name, fields)
    state_class.policy_class = policy_class
    # numba's index on disk looks the class up by its module and name.
    state_class.__module__ = policy_class.__module__
    setattr(sys.modules[policy_class.__module__], name, state_class)
    return state_class


def state_of(policy: Any) -> Any:
    """The policy's attributes as a named tuple that compiled code accepts; arrays are shared."""
    state = {k: v for k, v in vars(policy).items() if not k.startswith("_")}
    return _state_class(type(policy), tuple(state))(**state)  # type: ignore[arg-type]


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
def kernel(
    function: Callable[..., Any], policy_class: type, also: tuple[Path, ...] = ()
) -> Callable[..., Any]:
    """`function` compiled for one class of policies, whose state is its first argument.

    A function that takes no policy is compiled for `Policy` itself. also: see `save_code`.
    """
    compiled: Any = numba.njit(nogil=True)(function)
    save_code(compiled, function, policy_class, also)
    return compiled


def save_code(
    compiled: Any, function: Callable[..., Any], policy_class: type, also: Sequence[Path] = ()
) -> None:
    """Keep what `compiled` compiles of `function` on disk, for as long as its sources stay.

    Those are policy_class's, and `also`.
    """
    config: Any = numba.config
    with _compiling:
        numba_folder = config.CACHE_DIR
        try:
            name = f"{policy_class.__name__}-{_digest(policy_class, also)}"
            folder = cache_folder() / "compiled" / name
            folder.mkdir(parents=True, exist_ok=True)
            config.CACHE_DIR = str(folder)
            compiled._cache = _SavedCode(function)
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


def sources(policy_class: type) -> list[Path]:
    """Every file that decides what a policy's kernels do; those of other policies do not."""
    package = Path(__file__).parents[2]
    files = {file for pattern in SHARED_SOURCES for file in package.glob(pattern)}
    for ancestor in policy_class.__mro__:
        if ancestor.__module__ not in sys.stdlib_module_names:
            files.add(Path(inspect.getfile(ancestor)))
    return sorted(files)


def _digest(policy_class: type, also: Sequence[Path]) -> str:
    """Of a policy's sources and of what compiles them, so that an edited policy compiles anew."""
    digest = hashlib.sha256(f"{numba.__version__} {sys.version} {os.uname().machine}".encode())
    for source in [*sources(policy_class), *also]:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]
