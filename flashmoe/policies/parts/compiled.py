"""Compiles policies: the same classes that run as plain Python become machine code by numba.

A policy is written as an ordinary class whose state lies in NumPy arrays. `freeze` makes a
named tuple of that state, which numba passes by reference, so that compiled `touch` and
`victim` change the arrays of the policy object itself. One replayed event of `lru` takes
0.1 microseconds this way, and 10 interpreted.

Compiled code is kept under ~/.cache/flashmoe, keyed by the sources that it was made from. Where
nothing can be kept, or what was kept cannot be read, every process compiles anew.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
import sys
import threading
from collections import namedtuple
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache
from numba.extending import overload, register_jitable

import flashmoe
from flashmoe.util.locations import cache_folder

logger = logging.getLogger(__name__)

# Where numba keeps code is one setting of the process: two threads that set it at once have left a
# folder of compiled code in the working directory.
_compiling = threading.Lock()
# Held across a fork too: a child must not find it taken by a thread that it does not have.
os.register_at_fork(
    before=_compiling.acquire,
    after_in_parent=_compiling.release,
    after_in_child=_compiling.release,
)
# Of all compiled code, relative to the package.
SOURCES = ("events.py", "cache/expert_cache.py", "policies/**/*.py")
helper = register_jitable  # a function that policies may call, compiled or not


def touch(policy, event, now):  # type: ignore[no-untyped-def]
    """policy.touch, callable from compiled code on what `freeze` returns."""
    policy.touch(event, now)


def victim(policy, candidates):  # type: ignore[no-untyped-def]
    """policy.victim, likewise."""
    return policy.victim(candidates)


@overload(touch, strict=False)  # a method calls its first argument `self`
def _touch(policy, event, now):  # type: ignore[no-untyped-def]
    return policy.instance_class.policy_class.touch


@overload(victim, strict=False)
def _victim(policy, candidates):  # type: ignore[no-untyped-def]
    return policy.instance_class.policy_class.victim


@cache
def _state_class(policy_class: type, fields: tuple[str, ...]) -> Any:
    name = f"{policy_class.__name__}State"
    make: Any = namedtuple  # of fields known at run time only
    made = make(name, fields)
    made.policy_class = policy_class
    made.__module__ = policy_class.__module__  # numba's index on disk names it by its module
    setattr(sys.modules[policy_class.__module__], name, made)
    return made


def freeze(policy: Any) -> Any:
    """The policy's attributes as a named tuple that compiled code accepts."""
    state = {k: v for k, v in vars(policy).items() if not k.startswith("_")}
    return _state_class(type(policy), tuple(state))(**state)  # type: ignore[arg-type]


class _Kept(FunctionCache):  # type: ignore[misc]
    """Compiled code on disk; a full disk or a damaged file only costs the time to compile."""

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
            logger.debug("%s: not kept: %r", self.cache_path, error)


@cache
def kernel(function: Callable[..., Any], policy_class: type) -> Callable[..., Any]:
    """`function` compiled for one class of policies (its first argument, frozen)."""
    compiled: Any = numba.njit(nogil=True)(function)
    config: Any = numba.config
    with _compiling:
        before = config.CACHE_DIR
        try:
            name = f"{policy_class.__name__}-{_digest(policy_class)}"
            folder = cache_folder() / "compiled" / name
            folder.mkdir(parents=True, exist_ok=True)
            config.CACHE_DIR = str(folder)
            compiled._cache = _Kept(function)
        except (OSError, RuntimeError) as error:  # no home, or no place to write to
            logger.debug("compiled anew in every process: %s", error)
        finally:
            config.CACHE_DIR = before
    return compiled


def _digest(policy_class: type) -> str:
    """Of all that decides what a kernel does: editing a policy never runs its old code."""
    own = Path(inspect.getfile(policy_class))
    package = Path(flashmoe.__file__).parent
    sources = [own, *(file for pattern in SOURCES for file in package.glob(pattern))]
    digest = hashlib.sha256(f"{numba.__version__} {sys.version} {os.uname().machine}".encode())
    for source in sorted(set(sources)):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]
