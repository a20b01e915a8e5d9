"""The project's main job: from nothing to the tables of this machine."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

import flashmoe
from flashmoe.engines.transformers.checkpoints.pack import pack
from flashmoe.util import workers
from flashmoe.util.progress import count_bar
from harness.demo.prompts import PROMPTS
from harness.progress import say
from harness.report import provenance, report
from harness.runs import disturbance, ssd
from harness.runs.disturbance import Repeater
from harness.runs.job import Job
from harness.tables import (
    full_scale,
    hit_rates,
    inexact_systems,
    paper_figures,
    paper_networks,
    paper_rates,
    paper_training,
    speedups,
    text_table,
    warm_table,
)

DEMO_SLOTS = [8, 32, 64]
COMPARED_SLOTS = [32]
QUICK_TOKENS = 48
QUICK_ROUNDS = 2
FIO_SECONDS = 0.5


def folder_for(profile: str) -> Path:
    return report.RESULTS / f"{provenance.machine_slug()}-{profile}"


def run_ssd(folder: Path, command: str, seconds: float = 1.0) -> None:
    say("measuring the drive")
    with report.scratch(folder) as work:
        tables = ssd.measure(work, say, seconds=seconds)
    for name, rows in tables.items():
        if rows:
            report.write(folder, name, rows)
    report.record(folder, "ssd", command)


def run_hit_rates(
    folder: Path, command: str, traces: Path | None = None, timed: bool = True
) -> None:
    """The demo model's held-out routing; with `traces`, also the small models' and theirs.

    timed: write what the policies cost, too; it is this machine's only where it replays.
    """
    say("replaying recorded routing")
    cases = hit_rates.shipped_cases(hit_rates.demo_expert_bytes())
    if traces:
        cases = hit_rates.shipped_cases(hit_rates.demo_expert_bytes(), hit_rates.STAND_INS)
        cases += hit_rates.outside_cases(traces)
    with count_bar("replaying", hit_rates.total_events(cases), "event") as advance:
        rows, layers = hit_rates.table(cases, advance)
    # apart from what is the same on every machine, so that a new run shows what really changed
    costs = [
        {key: row[key] for key in ("trace", "part", "start", "capacity", "policy")}
        | {"microseconds": row.pop("microseconds")}
        for row in rows
    ]
    report.write(folder, "hit_rates", rows)
    if timed:
        report.write(folder, "policy_cost", costs)
    report.write(folder, "gap_by_layer", layers)
    report.record(folder, "hit_rates", command, seed=hit_rates.SEED)


def run_paper(folder: Path, command: str, traces: Path | None, networks: Path | None) -> None:
    """The paper's figures beside ours: on the demo model's routing, and on every trace given."""
    routings = paper_networks.routings(traces)
    with report.scratch(folder) as work:
        networks = networks or work
        say("training the paper's networks")
        paper_networks.train_all(routings, networks, say)
        say("replaying recorded routing")
        total = paper_rates.total_events(routings, networks)
        with count_bar("replaying", total, "event") as advance:
            rates = report.write(
                folder, "paper_rates", paper_rates.table(routings, networks, advance)
            )
        training = paper_training.table(routings, networks)
    report.write(folder, "paper_training", training)
    report.write(folder, "paper", paper_figures.table(rates, routings))
    report.record(folder, "paper", command, seed=paper_networks.SEED)


def run_generation(folder: Path, command: str) -> None:
    with report.scratch(folder) as work:
        say("packing the demo model")
        store = work / "demo.store"
        pack(flashmoe.demo_path(), store)
        base = Job(
            "flashmoe",
            flashmoe.demo_path(),
            store,
            0,
            PROMPTS["python"],
            QUICK_TOKENS,
        )
        _untimed(folder, store)
        drive = speedups.drive_of(store, FIO_SECONDS)
        jobs = speedups.jobs_for(base, DEMO_SLOTS, COMPARED_SLOTS)
        repeater = Repeater(disturbance.QUICK_AGAIN_SECONDS, say)
        rows = speedups.table(jobs, QUICK_ROUNDS, drive, say, repeater)
    report.write(folder, "generation", rows)
    report.record(folder, "generation", command)


def _untimed(folder: Path, store: Path) -> None:
    """Tables of what comes out, not of how fast: two at a time, a core each."""
    say("generating text from the store; what other output costs in quality; starting warm")
    with ProcessPoolExecutor(2, workers.CONTEXT, initializer=_on_one_core) as pool:
        tables = {
            "text": text_table.table,
            "quality": inexact_systems.table,
            "warm": warm_table.table,
        }
        pending = {name: pool.submit(table, store) for name, table in tables.items()}
        for name, rows in pending.items():
            report.write(folder, name, rows.result())


def _on_one_core() -> None:
    workers.end_with_parent()
    workers.silence_stderr()
    torch.set_num_threads(1)


def run_speedups(folder: Path, command: str) -> None:
    """Every system under caps, on a model small enough for it to take minutes."""
    full_scale.full_scale(folder, command, full_scale.QUICK)


def reproduce(profile: str, command: str) -> Path:
    """Everything that the profile has. Returns the folder with the results."""
    folder = folder_for(profile)
    seconds = {"quick": 0.3, "desktop": 5.0}[profile]
    run_ssd(folder, command, seconds)
    run_hit_rates(folder, command)
    run_generation(folder, command)
    run_speedups(folder, command)
    if profile == "desktop":
        full_scale.full_scale(folder, command, full_scale.Comparison("deepseek-v2-lite", rounds=1))
    say(f"done: {folder}")
    return folder
