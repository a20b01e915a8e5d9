"""Lets engines stand still while the process forks, so that the child has a whole one too.

A child has the memory of its parent and none of its threads: what another thread had locked
would stay locked there, and what it was reading would never arrive. Nor may the kernel write to
memory while it is being copied (see O_DIRECT in open(2)). In a child torch computes with one
thread, as in a DataLoader's worker; `torch.set_num_threads` is for those who know better.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Protocol


class Forkable(Protocol):
    """What has threads or locks."""

    def stand_still(self) -> None:
        """End what is under way, and begin nothing until `go_on`, which the same thread calls."""

    def go_on(self, *, in_child: bool) -> None:
        """The fork is over; `in_child`, no other thread exists."""


_all: weakref.WeakSet[Forkable] = weakref.WeakSet()
_still: list[Forkable] = []
_one_fork = threading.RLock()  # at a time; guards both


def look_after(new: Forkable) -> None:
    """From now on `new` stands still at every fork, as long as it lives."""
    with _one_fork:
        _all.add(new)


def _before() -> None:
    _one_fork.acquire()
    for each in list(_all):
        each.stand_still()
        _still.append(each)


def _after(in_child: bool) -> None:
    while _still:
        _still.pop().go_on(in_child=in_child)
    _one_fork.release()


os.register_at_fork(
    before=_before,
    after_in_parent=lambda: _after(in_child=False),
    after_in_child=lambda: _after(in_child=True),
)
