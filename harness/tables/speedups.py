"""The generation tables: every system and budget in its own process, interleaved, repeated."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import baselines
from flashmoe.store import manifest as manifests
from harness.progress import Say
from harness.runs import disturbance, ssd
from harness.runs.budget import budget_for
from harness.runs.disturbance import Repeater
from harness.runs.isolated_run import Run, run_alone
from harness.runs.job import Job
from harness.runs.page_cache import drop_all

Drive = Callable[[], float]

REFERENCE = "in-memory"  # whose tokens the others' must be
OURS = "flashmoe"


def jobs_for(base: Job, slots: list[int], compared: list[int]) -> list[Job]:
    """FlashMoE at each budget, under LRU and LFU at `compared` ones, and those without a budget."""
    budgets = [replace(base, memory_bytes=budget_for(base.store, n)) for n in slots]
    return [
        *budgets,
        *(
            replace(base, system=name, memory_bytes=budget_for(base.store, n))
            for n in compared
            for name in ("flashmoe-lru", "flashmoe-lfu")
        ),
        replace(base, system="on-demand"),
        replace(base, system=REFERENCE),
    ]


def drive_of(store: Path, seconds: float) -> Drive | None:
    """fio's speed for random reads of the store's own extents; None where fio is missing."""
    if ssd.fio_path() is None:
        return None
    manifest = manifests.load(store)
    path, extent_bytes = store / manifest.experts_file, manifest.layers[0].extent_bytes
    return partial(ssd.read_speed, path, extent_bytes, seconds)


def table(
    jobs: list[Job],
    rounds: int,
    drive: Drive | None,
    say: Say,
    repeater: Repeater,
    journal: Path | None = None,
    until: float | None = None,
) -> list[dict[str, Any]]:
    """Run every job `rounds` times in turn; medians, spread, and the roofline of each.

    `drive` gives the bytes a second of random reads of the store's extents. It is asked before
    every run, and after those that stream: a shared drive's speed drifts, and the faster of the
    two counts. None: no roofline from a drive. The page cache is emptied before each run under a
    cap, where that is allowed. `repeater` measures again what was disturbed. `journal` is a file
    in which finished runs are noted, so that an interrupted table goes on where it was. No round
    begins that would not end by `until`, on time.monotonic(); nor a run after it, whose row is
    left out then.
    """
    results: list[list[Run]] = [[] for _ in jobs]
    just_now: float | None = None  # the drive's speed, where no run came since
    ends = math.inf if until is None else until
    round_seconds = 0.0
    for round_number in range(rounds):
        began = time.monotonic()
        if began + round_seconds > ends:
            break
        for job, runs in zip(jobs, results, strict=True):
            if not round_number and any(results) and time.monotonic() > ends:
                break
            name = noted_as(round_number, job)
            run = recall(journal, name)
            if run is not None:
                just_now = None
            else:

                def attempt(job: Job = job) -> Run:
                    nonlocal just_now
                    # only where it matters: Python and torch come from the disk again
                    dropped = job.cap_bytes is not None and drop_all()
                    asked = drive if job.system != REFERENCE else None
                    before = just_now or (asked() if asked else None)
                    run = run_alone(job) | {"cold": dropped}
                    just_now = drive() if drive and "bytes_per_token" in run else None
                    speeds = [speed for speed in (before, just_now) if speed]
                    return run | {"drive_bytes_per_second": max(speeds, default=None)}

                run = repeater.least_disturbed(attempt)
                append(journal, name, round_number, run)
            runs.append(run)
            say(f"round {round_number + 1} of {rounds}: {job.system} {_in_words(run)}")
        round_seconds = time.monotonic() - began
    results = [runs for runs in results if runs]
    arithmetic = [[s for run in runs if (s := _arithmetic_seconds(run))] for runs in results]
    compute = min((statistics.median(s) for s in arithmetic if s), default=0.0)
    rows = [_row(runs, compute) for runs in results]
    _compare(rows, results)
    return rows


def noted_as(round_number: int, job: Job) -> str:
    """A run's name in a journal, wherever its files lie: they are written anew."""
    paths = {"checkpoint": job.checkpoint.name, "store": job.store.name}
    return f"{round_number} {asdict(job) | paths}"


def recall(journal: Path | None, name: str) -> Run | None:
    """The run of this name, if the journal has one."""
    if journal is None or not journal.exists():
        return None
    return next((note["run"] for note in _notes(journal) if note["name"] == name), None)


def _notes(journal: Path) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in journal.read_text().splitlines())


def append(journal: Path | None, name: str, round_number: int, run: Run) -> None:
    if journal:
        journal.parent.mkdir(parents=True, exist_ok=True)
        with open(journal, "a") as file:
            note = {"name": name, "round": round_number, "run": run}
            file.write(json.dumps(note) + "\n")


def tokens(journal: Path, jobs: Sequence[Job], rounds: int) -> list[dict[str, Any]]:
    """How long each measured token of these jobs' runs took, in order, as noted in `journal`."""
    names = {noted_as(number, job) for number in range(rounds) for job in jobs}
    return [
        {
            "system": run["system"],
            "cap_bytes": run["cap_bytes"],
            "read_limit_bytes_per_second": run.get("read_limit_bytes_per_second"),
            "round": note["round"] + 1,
            "token": number,
            "milliseconds": 1e3 * seconds,
        }
        for note in _notes(journal)
        if note["name"] in names
        for run in (note["run"],)
        for number, seconds in enumerate(run.get("token_seconds", ()), 1)
    ]


def _in_words(run: Run) -> str:
    cap = f"cap {run['cap_bytes'] / 1e9:.2f} GB " if run["cap_bytes"] else ""
    if run["outcome"] != "ok":
        return cap + str(run["outcome"])
    slots = "" if run["slots"] is None else f"{run['slots']:.3g} slots "
    told = ", disturbed" if run.get("disturbed") else ""
    return f"{cap}{slots}{run['tokens_per_second']:.2f} token/s{told}"


def _arithmetic_seconds(run: Run) -> float:
    """What a token took beside reading; 0: not known. The least is what no system gets below.

    Plain transformers alone would not do: its experts can be slower than the engine's.
    """
    if run["system"] == REFERENCE and run["outcome"] == "ok":
        return float(1 / run["tokens_per_second"])
    return float(run.get("experts_seconds", 0) + run.get("rest_of_model_seconds", 0))


def _row(runs: list[Run], compute: float) -> dict[str, Any]:
    """One row; of a system that ran out of memory in any round, no more than that."""
    first = next((run for run in runs if run["outcome"] != "ok"), runs[0])
    limits = {
        "cap_bytes": first["cap_bytes"],
        "read_limit_bytes_per_second": first["read_limit_bytes_per_second"],
    }
    if first["outcome"] != "ok":
        return {"system": first["system"], "outcome": first["outcome"], **limits}

    def median(name: str) -> float | None:
        values = [run[name] for run in runs if run.get(name) is not None]
        return statistics.median(values) if values else None

    rates = sorted(run["tokens_per_second"] for run in runs)
    row: dict[str, Any] = {
        "system": first["system"],
        "outcome": "ok",
        **limits,
        "slots": first["slots"],
        "bypass_slots": first.get("bypass_slots"),
        "shared": first["shared"],
        "memory_bytes": first["memory_bytes"],
        "hit_rate": median("hit_rate"),
        "bytes_per_token": median("bytes_per_token"),
        "device_bytes_per_token": median("device_bytes_per_token"),
        "tokens_per_second": statistics.median(rates),
        "tokens_per_second_min": rates[0],
        "tokens_per_second_max": rates[-1],
        "token_median_ms": 1e3 * (median("token_median_seconds") or 0),
        "token_p95_ms": 1e3 * (median("token_p95_seconds") or 0),
        "token_p99_ms": 1e3 * (median("token_p99_seconds") or 0),
        "first_token_seconds": median("first_token_seconds"),
        "load_seconds": median("load_seconds"),
        "cpu_seconds_per_token": median("cpu_seconds_per_token"),
        "joules_per_token": median("joules_per_token"),
    }
    if "experts_seconds" in first:
        row |= _roofline(runs, compute)
        for part in ("wait", "experts", "policy", "python", "rest_of_model"):
            row[f"{part}_ms"] = 1e3 * (median(f"{part}_seconds") or 0)
        row["policy_share"] = row["policy_ms"] * row["tokens_per_second"] / 1e3
        row["drive_busy_share"] = median("drive_busy_share")
        row["prefetch_used"] = median("prefetch_used")
        row["prefetch_wasted"] = median("prefetch_wasted")
        row["resident_bytes"] = max(run["resident_bytes"] for run in runs)
        row["page_cache_bytes"] = max(run["page_cache_bytes"] for run in runs)
    row["prediction_accuracy"] = median("prediction_accuracy")
    peaks = [run["peak_memory_bytes"] for run in runs]
    row["peak_memory_bytes"] = max(peaks) if None not in peaks else None
    row["cold"] = all(run["cold"] for run in runs)
    row["tokens"] = min(run["tokens"] for run in runs)
    # where rounds stopped at different tokens, no replay gives their hit rate
    counted = {(run["tokens"], run.get("warm_up_tokens")) for run in runs}
    row["warm_up_tokens"] = first.get("warm_up_tokens") if len(counted) == 1 else None
    row["rounds"] = len(runs)
    return row | disturbance.columns(runs)


def _roofline(runs: list[Run], compute: float) -> dict[str, Any]:
    """The least seconds a token can take: those of the drive or those of the arithmetic.

    Bytes that a wrong guess read are no part of it: they are a loss, and show as one.
    """
    floors = []
    for run in runs:
        drive = run["drive_bytes_per_second"]
        if limit := run["read_limit_bytes_per_second"]:
            drive = min(drive or limit, limit)
        needed = run["bytes_per_token"] - run["wasted_bytes_per_token"]
        floors.append(max(needed / drive, compute) if drive else compute)
    shares = [run["tokens_per_second"] * f for run, f in zip(runs, floors, strict=True)]
    drives = [run["drive_bytes_per_second"] for run in runs if run["drive_bytes_per_second"]]
    return {
        "roofline_tokens_per_second": statistics.median(1 / floor for floor in floors),
        "share_of_roofline": statistics.median(shares),
        "share_min": min(shares),
        "share_max": max(shares),
        "drive_bytes_per_second": statistics.median(drives) if drives else None,
    }


def _limits(run: Run) -> tuple[int | None, int | None]:
    return run["cap_bytes"], run["read_limit_bytes_per_second"]


def _compare(rows: list[dict[str, Any]], results: list[list[Run]]) -> None:
    """Fill in whose tokens are the reference's, and how much faster FlashMoE is at the same limits.

    Without a run of the reference all exact systems are compared with FlashMoE. Slow systems
    stop early, so that only the tokens that both have are compared.
    """
    finished = [runs for runs in results if all(run["outcome"] == "ok" for run in runs)]
    by_name = {runs[0]["system"]: runs for runs in reversed(finished)}
    reference = by_name.get(REFERENCE) or by_name.get(OURS)
    ours = {
        _limits(runs[0]): runs
        for runs in finished
        if runs[0]["system"] == OURS and runs[0]["cap_bytes"]
    }
    for row, runs in zip(rows, results, strict=True):
        if row["outcome"] != "ok":
            continue
        if reference:
            expected, output = reference[0]["token_ids"], runs[0]["token_ids"]
            new = list(zip(expected, output, strict=False))[runs[0]["prompt_tokens"] :]
            differing = sum(a != b for a, b in new) / len(new)
            row["tokens_differing"] = differing
            name = row["system"].partition(":")[0]
            system = baselines.available().get(name)  # none: a peer, of other kernels
            row["same_output"] = not differing if system and system.exact else None
        if our_runs := ours.get(_limits(runs[0])):
            ratios = [
                our_run["tokens_per_second"] / run["tokens_per_second"]
                for our_run, run in zip(our_runs, runs, strict=True)
            ]
            row["flashmoe_speedup"] = statistics.median(ratios)
            row["flashmoe_speedup_min"] = min(ratios)
            row["flashmoe_speedup_max"] = max(ratios)
