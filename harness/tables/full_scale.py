"""The speedup table at a real model's size: synthetic weights, recorded routing, real caps."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import psutil

import baselines
import flashmoe
from flashmoe import quant
from flashmoe.engines.transformers.checkpoints.named_models import total_bytes
from flashmoe.engines.transformers.checkpoints.synth import synthesise, synthesise_store
from flashmoe.errors import FlashMoEError
from flashmoe.residency.budget import SPARES
from flashmoe.store import manifest as manifests
from flashmoe.store.manifest import Manifest
from harness.report import plots, provenance, report
from harness.report.progress import say
from harness.runs.isolated_run import run_alone
from harness.runs.job import Job
from harness.runs.page_cache import cached_bytes
from harness.tables import speedups

ROUTING = Path(flashmoe.__file__).parent / "routing"


class Model(NamedTuple):
    """By whose routing a model is run."""

    routing: Path
    sequence: str


MODELS = {
    "olmoe-quarter": Model(flashmoe.demo_routing_path(), "python-1"),
    "olmoe-1b-7b": Model(flashmoe.demo_routing_path(), "python-1"),
    "deepseek-v2-lite": Model(ROUTING / "deepseek-v2-lite.npz", "kernel-docs-0"),
    "qwen3-30b-a3b": Model(ROUTING / "qwen3-30b-a3b.npz", "kernel-docs-0"),
}
SHIPPED = "shipped"  # what a row says of routing that comes with the project
CAPS = (0.15, 0.25, 0.4, 0.6, 1.2)  # as far as the machine has the memory
SYSTEMS = (
    "flashmoe",
    "flashmoe-no-prefetch",
    "flashmoe-lru",
    "fiddler",
    "daop",
    "os-paging",
    "os-paging-willneed",
)
# A prompt that touches nearly every expert, so that none is read, and checked, for the first
# time while decode is measured: a first read's checksum costs a fifth of the read here.
PROMPT_TOKENS = 160
WARM_UP_TOKENS, TOKENS, ROUNDS = 8, 32, 2
DECODE_SECONDS = 12.0  # slow systems stop then, whatever tokens are missing
UNEVEN_RATIO = 1.2  # of the median token's speed to that of all; elsewhere 1.08 at most
QUICK_CAPS = (0.4,)  # Python alone is a fifth of the small model's size
QUICK_DECODE_SECONDS = 3.0
QUICK_SYSTEMS = ("flashmoe", "fiddler", "daop", "os-paging")
# Python, torch, transformers and a prompt's activations: 480 MiB of anonymous memory without any
# weights, the code pages of the libraries, and what the allocator keeps. 640 MiB were enough on a
# Xeon; on an EPYC two of 36 runs were killed.
BESIDE_BYTES = 768 << 20
FIO_SECONDS = 1.0


def full_scale(
    folder: Path,
    command: str,
    name: str,
    *,
    caps: Sequence[float] = CAPS,
    slots: Sequence[int] = (),
    systems: Sequence[str] = SYSTEMS,
    rounds: int = ROUNDS,
    decode_seconds: float = DECODE_SECONDS,
    read_bytes_per_second: int | None = None,
    stores: Path | None = None,
    model: Model | None = None,
    label: str = "",
    scheme: str = quant.NONE,
    timelines: bool = True,
) -> None:
    """Write checkpoint and store (given back afterwards), run, write the tables.

    `slots` takes the place of `caps`: experts of each layer that FlashMoE shall have room for.
    `stores` keeps checkpoint and store: a directory, where they are made if absent. `model` names
    other routing than the shipped; `label` goes into the table's name. `scheme` quantises.
    `timelines` draws one token of it, with and without guesses.
    """
    if name not in MODELS:
        raise FlashMoEError(f"no routing is shipped for {name!r}: choose from {', '.join(MODELS)}")
    for system in systems:  # before gigabytes are written
        baselines.get(system)
    shipped = model is None
    model = model or MODELS[name]
    with report.scratch(stores or folder) as work:
        home = stores or work
        checkpoint, store = home / "checkpoint", home / "store"
        if not manifests.is_store(store):
            say(f"writing {name} with random weights")
            if fits(total_bytes(name)) and scheme == quant.NONE:
                if not checkpoint.exists():
                    synthesise(name, checkpoint)
                say("packing it")
                report.write(folder, f"packing-{name}", [_pack(name, checkpoint, store)])
            else:  # no reference run then; `accelerate-disk` alone would need the checkpoint
                synthesise_store(name, store, quant=scheme)
        manifest = manifests.load(store)
        total = manifest.experts_bytes + manifest.dense_bytes
        sizes: list[float] = [cap_for(manifest, n) for n in slots]
        sizes = sizes or [share * total for share in caps]
        base = replace(
            job(model, checkpoint, store),
            read_bytes_per_second=read_bytes_per_second,
            decode_seconds=decode_seconds,
        )
        jobs = [
            replace(limited, system=system)
            for limited in (capped(base, manifest, size) for size in sizes if fits(size))
            for system in systems
        ]
        if not jobs:
            raise FlashMoEError(f"this machine has not the memory for {name} at any of those caps")
        if fits(total) and checkpoint.exists() and not read_bytes_per_second:
            jobs.append(replace(base, system=speedups.REFERENCE))
        title = titled("speedups", name, scheme, label)
        rows = measured(folder, title, jobs, rounds)
        _tell_uneven(rows)
        publish_tokens(folder, title)
        rows = named(rows, name, SHIPPED if shipped else model.routing.stem, model, total)
        plots.speedups(published(folder, title, rows, command), folder, title)
        if timelines and speedups.OURS in systems and not label:
            _timelines(folder, name, capped(base, manifest, sizes[len(sizes) // 2]))


def _tell_uneven(rows: list[dict[str, Any]]) -> None:
    """Say which systems had some tokens much slower than most, as those do that are not warm."""
    for row in rows:
        speed, median_ms = row.get("tokens_per_second"), row.get("token_median_ms")
        if speed and median_ms and 1e3 / median_ms > UNEVEN_RATIO * speed:
            say(
                f"{row['system']}: some tokens were much slower than most ({speed:.2f} token/s, "
                f"{1e3 / median_ms:.2f} by its median token); if it was not warm yet, more "
                "--decode-seconds help"
            )


def titled(kind: str, name: str, scheme: str, label: str = "") -> str:
    """What a table is called; bf16, and no label, go without saying."""
    return "-".join(
        [kind, name, *(part for part in (scheme, label) if part not in ("", quant.NONE))]
    )


def measured(folder: Path, title: str, jobs: list[Job], rounds: int) -> list[dict[str, Any]]:
    """Rows of the jobs; an interrupted table goes on where it was, until it is published."""
    short = (jobs[0].decode_seconds or DECODE_SECONDS) < DECODE_SECONDS
    drive = speedups.drive_of(jobs[0].store, FIO_SECONDS / 2 if short else FIO_SECONDS)
    return speedups.table(jobs, rounds, drive, say, _kept(folder, title))


def published(folder: Path, title: str, rows: list[dict[str, Any]], command: str) -> pd.DataFrame:
    """Write the table and where it came from."""
    frame = report.write(folder, title, rows)
    report.provenance(folder, title, provenance.gather(command, folder, seed=0))
    _kept(folder, title).unlink(missing_ok=True)
    return frame


def publish_tokens(folder: Path, title: str) -> None:
    """Write how long each token of the table took. To be called before the table is published."""
    tokens = speedups.tokens(_kept(folder, title))
    report.csv(folder, f"tokens-{title}", pd.DataFrame(tokens))


def _kept(folder: Path, title: str) -> Path:
    return folder / f".{title}.runs.jsonl"


def job(model: Model, checkpoint: Path, store: Path) -> Job:
    """FlashMoE on a model of random weights, by its recorded routing; no limits yet."""
    return Job(
        "flashmoe",
        checkpoint,
        store,
        0,
        "",
        TOKENS,
        routing=model.routing,
        sequence=model.sequence,
        prompt_tokens=PROMPT_TOKENS,
        warm_up_tokens=WARM_UP_TOKENS,
        decode_seconds=DECODE_SECONDS,
    )


def named(
    rows: list[dict[str, Any]], name: str, source: str, model: Model, total_bytes: int
) -> list[dict[str, Any]]:
    """Rows that say of which model they are, whose routing it had, and how large the cap was."""
    routing = f"{source}: {model.sequence}"
    shares = [row["cap_bytes"] and round(row["cap_bytes"] / total_bytes, 3) for row in rows]
    return [
        {"model": name, "routing": routing, "cap_share": share} | row
        for share, row in zip(shares, rows, strict=True)
    ]


def cap_for(manifest: Manifest, slots: int) -> int:
    """The cap that leaves FlashMoE `slots` experts of every layer, and its spare ones."""
    layers = manifest.layers
    experts = slots * sum(layer.extent_bytes for layer in layers) + SPARES * layers[0].extent_bytes
    return manifest.dense_bytes + BESIDE_BYTES + experts


def capped(job: Job, manifest: Manifest, cap_bytes: float) -> Job:
    """`job` under a limit; what that leaves for experts."""
    memory_bytes = int(cap_bytes) - manifest.dense_bytes - BESIDE_BYTES
    return replace(job, cap_bytes=int(cap_bytes), memory_bytes=memory_bytes)


def _timelines(folder: Path, name: str, job: Job) -> None:
    """One token with and without guesses, as the job's caps have it."""
    rows = []
    for system in ("flashmoe-no-prefetch", "flashmoe"):
        run = run_alone(replace(job, system=system, timeline=True))
        rows += [
            {"system": system, "what": what, "start_ms": 1e3 * start, "end_ms": 1e3 * end}
            for what, start, end in run.get("timeline", ())
        ]
    frame = report.write(folder, f"timeline-{name}", rows)
    plots.timeline(frame, folder, f"timeline-{name}")


def fits(size_bytes: float) -> bool:
    """Does this machine's memory hold so much, with some to spare?"""
    return bool(size_bytes + BESIDE_BYTES < psutil.virtual_memory().total * 0.9)


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
