"""The tables at a real model's size: synthetic weights, recorded routing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import flashmoe
from flashmoe.errors import FlashMoEError
from flashmoe.store import manifest as manifests
from flashmoe.store.manifest import Manifest
from flashmoe.synth import synthesise
from harness import plots, provenance, report, speedups
from harness.page_cache import cached_bytes
from harness.reproduce import say, scratch
from harness.run import Job

MODEL = "olmoe-1b-7b"
SEQUENCE = "python-1"
SLOTS = [16, 32]
COMPARED_SLOTS = [16, 32]
# A prompt that touches nearly every expert, so that none is read, and checked, for the first
# time while decode is measured: a first read's checksum costs a fifth of the read here.
PROMPT_TOKENS = 160
WARM_UP_TOKENS, TOKENS, ROUNDS = 8, 16, 2
BESIDE_EXPERTS_BYTES = 1 << 30  # Python, torch and activations, in the cap beside all weights held
FIO_SECONDS = 2.0


def full_scale(folder: Path, command: str, stores: Path | None = None) -> None:
    """Write checkpoint and store (27 GB, given back afterwards), run, write the tables.

    `stores` keeps them: a directory with `checkpoint` and `store`, made there if absent.
    """
    with scratch(stores or folder) as work:
        home = stores or work
        checkpoint, store = home / "checkpoint", home / "store"
        if not checkpoint.exists():
            say(f"writing {MODEL} with random weights")
            synthesise(MODEL, checkpoint)
        if not store.exists():
            say("packing it")
            report.write(folder, "packing", [_pack(checkpoint, store)])
            report.provenance(folder, "packing", provenance.gather(command, folder, seed=0))
        manifest = manifests.load(store)
        drive = speedups.drive_of(store, FIO_SECONDS)
        base = Job(
            "flashmoe",
            checkpoint,
            store,
            0,
            "",
            TOKENS,
            routing=flashmoe.demo_routing_path(),
            sequence=SEQUENCE,
            prompt_tokens=PROMPT_TOKENS,
            warm_up_tokens=WARM_UP_TOKENS,
        )
        jobs = [_capped(job, manifest) for job in speedups.jobs_for(base, SLOTS, COMPARED_SLOTS)]
        rows = speedups.table(jobs, ROUNDS, drive, say)
    frame = report.write(folder, "full_scale", rows)
    plots.generation(
        frame, folder, "full_scale",
        "OLMoE-1B-7B's shapes, synthetic weights, recorded routing: where a token's time goes",
    )  # fmt: skip
    report.provenance(folder, "full_scale", provenance.gather(command, folder, seed=0))


def _capped(job: Job, manifest: Manifest) -> Job:
    """The kernel holds a streaming run to its budget, the dense weights and a fixed rest."""
    if job.system == "in-memory":
        return job
    return replace(job, cap_bytes=job.memory_bytes + manifest.dense_bytes + BESIDE_EXPERTS_BYTES)


def _pack(checkpoint: Path, store: Path) -> dict[str, Any]:
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
        "model": MODEL,
        "store_bytes": manifest.experts_bytes + manifest.dense_bytes,
        "seconds": time.monotonic() - started,
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "page_cache_bytes": sum(map(cached_bytes, files)),
    }
