"""The generation table: every system and budget in its own process, interleaved, repeated."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from flashmoe.errors import FlashMoEError
from flashmoe.store import manifest as manifests
from harness import ssd
from harness.memory_cap import memory_cap
from harness.run import Job

Say = Callable[[str], None]
Drive = Callable[[], float]


def budget_for(store: Path, slots: int) -> int:
    """The bytes that give every layer exactly `slots` slots."""
    return slots * sum(layer.extent_bytes for layer in manifests.load(store).layers)


def jobs_for(base: Job, slots: list[int], compared: list[int]) -> list[Job]:
    """FlashMoE at each budget, under LRU and LFU at `compared` ones, and those without a budget."""
    top_k = manifests.load(base.store).top_k
    least = budget_for(base.store, top_k)
    budgets = [replace(base, memory_bytes=budget_for(base.store, n)) for n in slots]
    return [
        *budgets,
        *(
            replace(base, system=name, memory_bytes=budget_for(base.store, n))
            for n in compared
            for name in ("flashmoe-lru", "flashmoe-lfu")
        ),
        replace(base, system="on-demand", memory_bytes=least),
        replace(base, system="in-memory", memory_bytes=least),
    ]


def drive_of(store: Path, seconds: float) -> Drive | None:
    """fio's speed for random reads of the store's own extents; None where fio is missing."""
    if ssd.fio_path() is None:
        return None
    manifest = manifests.load(store)
    path, extent_bytes = store / manifest.experts_file, manifest.layers[0].extent_bytes
    return partial(ssd.random_read_speed, path, extent_bytes, seconds)


def run_alone(job: Job) -> dict[str, Any]:
    """Run a job in a process of its own, capped by the kernel where the job says so.

    Raises FlashMoEError with its last words, or when it must be capped and cannot be.
    """
    values = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(job).items()}
    command = [sys.executable, "-m", "harness", "run", job.system, "--job", json.dumps(values)]
    with memory_cap(job.cap_bytes) as cap:
        enter = cap.enter if cap else None
        done = subprocess.run(command, capture_output=True, text=True, preexec_fn=enter)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
            raise FlashMoEError(f"{job.system} failed: {said[-1]}")
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        result["cap_bytes"] = job.cap_bytes if cap else None
        result["peak_memory_bytes"] = cap.peak_bytes() if cap else None
    return result


def table(jobs: list[Job], rounds: int, drive: Drive | None, say: Say) -> list[dict[str, Any]]:
    """Run every job `rounds` times in turn; medians, spread, and the roofline of each.

    `drive` gives the bytes a second of random reads of the store's extents. It is asked before
    every run that streams, since a shared drive's speed drifts; None: no roofline from a drive.
    """
    results: list[list[dict[str, Any]]] = [[] for _ in jobs]
    for round_number in range(rounds):
        for job, mine in zip(jobs, results, strict=True):
            speed = drive() if drive and job.system != "in-memory" else None
            mine.append(run_alone(job) | {"drive_bytes_per_second": speed})
            say(
                f"round {round_number + 1} of {rounds}: {job.system} "
                f"{'' if mine[-1]['slots'] is None else str(mine[-1]['slots']) + ' slots '}"
                f"{mine[-1]['tokens_per_second']:.2f} token/s"
            )
    compute = min(statistics.median(map(_arithmetic_seconds, mine)) for mine in results)
    rows = [_row(mine, compute) for mine in results]
    _mark_equal(rows)
    return rows


def _arithmetic_seconds(run: dict[str, Any]) -> float:
    """What a token took beside reading; the table's least is what no system gets below.

    Plain transformers alone would not do: its experts can be slower than the engine's.
    """
    if run["system"] == "in-memory":
        return float(1 / run["tokens_per_second"])
    return float(run["experts_seconds"] + run["rest_of_model_seconds"])


def _row(runs: list[dict[str, Any]], compute: float) -> dict[str, Any]:
    first = runs[0]
    rates = sorted(run["tokens_per_second"] for run in runs)
    rate = statistics.median(rates)
    row = {
        "system": first["system"],
        "slots": first["slots"],
        "memory_bytes": first["memory_bytes"],
        "hit_rate": first.get("hit_rate"),
        "bytes_per_token": first.get("bytes_per_token"),
        "tokens_per_second": rate,
        "tokens_per_second_min": rates[0],
        "tokens_per_second_max": rates[-1],
    }
    if "hit_rate" in first:
        floors = [_floor(run, compute) for run in runs]
        if all(floors):
            shares = [run["tokens_per_second"] * f for run, f in zip(runs, floors, strict=True)]
            row["roofline_tokens_per_second"] = statistics.median(1 / f for f in floors)
            row["share_of_roofline"] = statistics.median(shares)
            row["share_min"], row["share_max"] = min(shares), max(shares)
        if first["drive_bytes_per_second"]:
            row["drive_bytes_per_second"] = statistics.median(
                run["drive_bytes_per_second"] for run in runs
            )
        row["same_output"] = None
        for part in ("wait", "experts", "policy", "python", "rest_of_model"):
            row[f"{part}_ms"] = 1e3 * statistics.median(run[f"{part}_seconds"] for run in runs)
        row["policy_share"] = row["policy_ms"] * rate / 1e3
        row["drive_busy_share"] = statistics.median(run["drive_busy_share"] for run in runs)
        row["resident_bytes"] = max(run["resident_bytes"] for run in runs)
        row["page_cache_bytes"] = max(run["page_cache_bytes"] for run in runs)
    row["cap_bytes"] = first["cap_bytes"]
    peaks = [run["peak_memory_bytes"] for run in runs]
    row["peak_memory_bytes"] = max(peaks) if None not in peaks else None
    row["tokens"] = first["tokens"]
    row["rounds"] = len(runs)
    row["token_ids"] = first["token_ids"]
    return row


def _floor(run: dict[str, Any], compute: float) -> float:
    """The least seconds a token can take (spec section 1): the drive's, or the arithmetic's."""
    drive = run["drive_bytes_per_second"]
    return max(run["bytes_per_token"] / drive, compute) if drive else compute


def _mark_equal(rows: list[dict[str, Any]]) -> None:
    """Fill `same_output`: are the token ids those of the in-memory run?"""
    reference = next((row["token_ids"] for row in rows if row["system"] == "in-memory"), None)
    for row in rows:
        if "same_output" in row and reference is not None:
            row["same_output"] = row["token_ids"] == reference
        del row["token_ids"]
