"""Compiles policies: the same classes that run as plain Python become machine code by numba.

A policy is an ordinary class whose state lies in NumPy arrays. `state_of` makes a named tuple of
these arrays, which numba passes by reference, so that compiled `touch` and `victim` change the
arrays of the policy object itself.
"""

from __future__ import annotations

import inspect
import sys
from collections import namedtuple
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from numba.extending import overload

from flashmoe.util import machine_code
from flashmoe.util.by_address import c_function

# The sources of every policy's compiled code, relative to the package.
SHARED_SOURCES = (
    "events.py",
    "cache/serving.py",
    "policies/base.py",
    "policies/parts/*.py",
    "util/by_address.py",
    "util/libc.py",
)


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


@cache
def kernel(
    function: Callable[..., Any], policy_class: type, also: tuple[Path, ...] = ()
) -> Callable[..., Any]:
    """`function` compiled for one class of policies, whose state is its first argument.

    A function that takes no policy is compiled for `Policy` itself. also: which other sources
    decide what it does.
    """
    name, files = policy_class.__name__, (*sources(policy_class), *also)
    return machine_code.compiled(function, name, files)


def c_kernel(
    function: Callable[..., Any],
    state: Any,
    policy_class: type,
    words: int = 0,
    also: tuple[Path, ...] = (),
) -> Any:
    """As `by_address.c_function`, compiled for one class of policies. also: as for `kernel`."""
    files = (*sources(policy_class), *also)
    return c_function(function, state, policy_class.__name__, files, words)


def sources(policy_class: type) -> list[Path]:
    """Every file that decides what a policy's kernels do; those of other policies do not."""
    package = Path(__file__).parents[2]
    files = {file for pattern in SHARED_SOURCES for file in package.glob(pattern)}
    for ancestor in policy_class.__mro__:
        if ancestor.__module__ not in sys.stdlib_module_names:
            files.add(Path(inspect.getfile(ancestor)))
    return sorted(files)
