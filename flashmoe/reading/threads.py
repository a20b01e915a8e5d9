"""Starts the threads that read."""

from __future__ import annotations

import threading
from collections.abc import Callable

from flashmoe.errors import FlashMoEError


def start_missing(
    threads: list[threading.Thread], count: int, target: Callable[..., object], *arguments: object
) -> None:
    """Add running threads until there are `count`; fewer do too, only slower.

    Raises FlashMoEError where not one can be started.
    """
    while len(threads) < count:
        name = f"flashmoe-read-{len(threads)}"
        thread = threading.Thread(target=target, args=arguments, name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError:
            if threads:
                return
            raise FlashMoEError(
                "no thread can be started to read experts: this process has as many threads, "
                "or as much memory, as it may: raise the limit (`ulimit -u`, `ulimit -v`)"
            ) from None
        threads.append(thread)
