"""Divides machine code's work among as many threads as torch computes with."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from itertools import pairwise

import torch


def in_shares(work: Callable[[int, int], None], count: int, least: int) -> None:
    """Call work(first, last) for shares of range(count) at once, one of them in this thread.

    least: fewer than that are not worth handing to another thread.
    """
    shares = max(1, min(torch.get_num_threads(), count // least))
    ours, *rest = pairwise(count * share // shares for share in range(shares + 1))
    others = [_threads(os.getpid()).submit(work, *bounds) for bounds in rest]
    try:
        work(*ours)
    finally:
        wait(others)  # in any case: they read what may be overwritten afterwards
    for other in others:
        other.result()


@cache
def _threads(process: int) -> ThreadPoolExecutor:
    """process: its number, for a forked child has none of its parent's threads."""
    return ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1), "flashmoe-shares")
