"""Engines that are not ours, one file each: runs as a program with a job.

`available()` lists them. A peer's `FILES` says what its job's checkpoint is; its `run` imports
nothing of FlashMoE's engine, so that the memory limit holds the peer and little else, and happens
in the environment whose Python FLASHMOE_PYTHON_NAME names, in this one where that is not set.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.runs.clock import Clock
from harness.runs.job import Job, prompt_ids

CHECKPOINT, GGUF = "checkpoint", "gguf"  # what a job's checkpoint may be: a hub's directory, a file
ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Peer:
    """An engine by the name that its rows bear."""

    name: str
    module: str

    @property
    def files(self) -> str:
        return str(importlib.import_module(self.module).FILES)

    @property
    def command(self) -> list[str]:
        """What runs it, but for the job."""
        name = self.name.replace("-", "_").upper()
        return [os.environ.get(f"FLASHMOE_PYTHON_{name}", sys.executable), "-m", self.module]

    def installed(self) -> bool:
        """Can its library be imported where it would run?"""
        command = [*self.command, _IS_IT_THERE]
        return not subprocess.run(command, cwd=ROOT, capture_output=True).returncode


def available() -> dict[str, Peer]:
    """Every peer, installed or not."""
    names = [info.name for info in pkgutil.iter_modules(__path__)]
    peers = [Peer(name.replace("_", "-"), f"{__name__}.{name}") for name in names]
    return {peer.name: peer for peer in peers}


Forward = Callable[[list[int]], int]  # the tokens that are new in, the likeliest next one out


def decode(job: Job, load: Callable[[Job], Forward], residency: str) -> dict[str, Any]:
    """Load, prefill, warm up, then decode `new_tokens` under the clock, greedily, batch 1."""
    started = time.perf_counter()
    forward = load(job)
    load_seconds = time.perf_counter() - started
    tokens = prompt_ids(job.prompt_tokens)
    clock, new = Clock(job), tokens
    clock.start()
    while clock.tokens < job.tokens and not clock.enough:
        new = [forward(new)]
        tokens += new
        clock.token()
    return {
        "system": job.system,
        "residency": residency,
        "memory_bytes": None,
        "slots": None,
        "shared": None,
        "load_seconds": load_seconds,
        "token_ids": tokens,
        "prompt_tokens": job.prompt_tokens,
    } | clock.figures()


_IS_IT_THERE = "--installed"


def program(run: Callable[[Job], dict[str, Any]], library: str) -> None:
    """What a peer's file does when it is run: its figures as the last line, JSON."""
    if sys.argv[1] == _IS_IT_THERE:
        importlib.import_module(library)
    else:
        print(json.dumps(run(Job.from_json(sys.argv[1]))))
