"""Engines that are not ours, one file each: run as a program with a job, prints its figures.

`available()` lists them. A peer's file imports nothing of FlashMoE's engine, so that the memory
limit holds the peer and little else. The checkpoint of its job is a GGUF file.
"""

from __future__ import annotations

import pkgutil


def available() -> dict[str, str]:
    """Of each peer, the module to run, by the name that its rows bear."""
    names = [info.name for info in pkgutil.iter_modules(__path__)]
    return {name.replace("_", "-"): f"{__name__}.{name}" for name in names}
