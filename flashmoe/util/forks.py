"""Lets engines stand still while the process forks, so that the child has a whole one too.

A child has the memory of its parent but none of its threads: a lock that another thread held
would stay locked there, and its reads would never arrive. The kernel must not write to memory
either while that memory is copied (see O_DIRECT in open(2)). torch computes with one thread in a
child, as in a DataLoader's worker, unless the child calls `torch.set_num_threads`.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Protocol


class Forkable(Protocol):
    """An object with threads or locks."""

    def stand_still(self) -> None:
        """Finish all work and begin none until `go_on`, which the same thread calls."""

    def go_on(self, *, in_child: bool) -> None:
        """Work again after the fork; `in_child`: no other thread exists here."""


_forkables: weakref.WeakSet[Forkable] = weakref.WeakSet()
_standing_still: list[Forkable] = []
_one_fork = threading.RLock()  # held during a fork; guards both collections


def look_after(new: Forkable) -> None:
    """Let `new` stand still at every fork from now on, as long as it lives."""
    with _one_fork:
        _forkables.add(new)


def _before() -> None:
    _one_fork.acquire()
    for forkable in list(_forkables):
        forkable.stand_still()
        _standing_still.append(forkable)


def _after(in_child: bool) -> None:
    while _standing_still:
        _standing_still.pop().go_on(in_child=in_child)
    _one_fork.release()


os.register_at_fork(
    before=_before,
    after_in_parent=lambda: _after(in_child=False),
    after_in_child=lambda: _after(in_child=True),
)
