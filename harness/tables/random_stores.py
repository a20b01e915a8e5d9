"""Stores of random weights, of real shapes, written for tables to measure."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashmoe.engines.transformers.checkpoints.synth import synthesise, synthesise_store
from flashmoe.errors import FlashMoEError
from flashmoe.store import manifest as manifests
from harness.progress import say
from harness.runs.page_cache import cached_bytes


def write_through_checkpoint(name: str, checkpoint: Path, store: Path) -> dict[str, Any]:
    """Write the checkpoint where it is not yet, and the store; how packing it went."""
    if not checkpoint.exists():
        synthesise(name, checkpoint)
    say("packing it")
    return _pack(name, checkpoint, store)


def of_schemes(name: str, schemes: Sequence[str], home: Path) -> dict[str, Path]:
    """A store of each scheme in `home`, of the same random weights; written where it is not yet."""
    paths = {scheme: home / f"store-{name}-{scheme}" for scheme in schemes}
    for scheme, store in paths.items():
        if not manifests.is_store(store):
            say(f"writing {name}, {scheme}")
            synthesise_store(name, store, quant=scheme)
    return paths


def _pack(name: str, checkpoint: Path, store: Path) -> dict[str, Any]:
    """`flashmoe pack` in a process of its own: how long, how much memory, what stays cached."""
    started = time.monotonic()
    command = [sys.executable, "-m", "flashmoe", "pack", str(checkpoint), str(store)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise FlashMoEError(f"packing {checkpoint} failed with status {process.returncode}")
    manifest = manifests.load(store)
    files = [store / manifest.experts_file, *checkpoint.glob("*.safetensors")]
    return {
        "model": name,
        "store_bytes": manifest.experts_bytes + manifest.dense_bytes,
        "seconds": time.monotonic() - started,
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "page_cache_bytes": sum(map(cached_bytes, files)),
    }
