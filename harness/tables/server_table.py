"""llama-server with FlashMoE and without, and rivals, on one GGUF file, under real caps."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from flashmoe import trace
from flashmoe.engines.transformers.checkpoints.named_models import config_of
from flashmoe.errors import FlashMoEError
from harness.progress import say
from harness.report import report
from harness.runs import disturbance, gguf_file, gguf_systems, ssd
from harness.runs.disturbance import Repeater, Watch
from harness.runs.gguf_systems import System, Work, user_engine
from harness.runs.gguf_systems.llama_server import PLAIN
from harness.runs.job import FIRST_TOKEN, STEERED_TOKENS, prompt_ids
from harness.runs.page_cache import drop_all
from harness.runs.self_routing_weights import SteeredWeights
from harness.tables import full_scale

CAPS = (0.5, 0.75)  # shares of the file
PROMPT_TOKENS, NEW_TOKENS = STEERED_TOKENS, 48
PROMPT = tuple(prompt_ids(PROMPT_TOKENS))
# It ends as it began, so the answer is what stood there: tokens can be guessed.
REPEATING = (
    *range(FIRST_TOKEN, FIRST_TOKEN + PROMPT_TOKENS + NEW_TOKENS),
    *range(FIRST_TOKEN, FIRST_TOKEN + 16),
)
REPEATED_SECONDS = 90  # a run that took longer is not repeated in later rounds
Run = dict[str, Any]


def server_table(
    folder: Path,
    command: str,
    name: str,
    program: Path,
    *,
    caps: Sequence[float] = CAPS,
    rounds: int = 1,
    scheme: str = "int4",
    stores: Path | None = None,
    systems: Sequence[str] = (),
    engines: Sequence[str] = (),
    repeating: bool = False,
) -> None:
    """Write the file (given back but for `stores`), run all in turn, report.

    systems: names of `gguf_systems.available()`; none: all that are usual and installed.
    engines: users' own beside them, `NAME=command ...` each (docs/engines.md).
    repeating: with the prompt that lets tokens be guessed, in a table of its own.
    Raises FlashMoEError for a system that is unknown or not installed.
    """
    chosen = _chosen(systems) + user_engine.systems(engines)
    user_engine.check_distinct([system.name for system in chosen])
    routing = full_scale.shipped_routing(name)
    recorded = trace.load(routing.trace).named(routing.sequence)
    prefix = recorded.first(PROMPT_TOKENS + NEW_TOKENS)
    with report.scratch(stores or folder) as work:
        model = (stores or work) / f"steered-{name}-{scheme}.gguf"
        if not model.exists():
            say(f"writing {name} with random weights and solved routers")
            weights = SteeredWeights(
                config_of(name), 0, prefix, partial(gguf_file.embeddings_in_file, scheme=scheme)
            )
            unfinished = model.with_suffix(".partial")
            gguf_file.write(weights, unfinished, scheme)
            unfinished.rename(model)
        prompt = REPEATING if repeating else PROMPT
        repeater = Repeater(disturbance.AGAIN_SECONDS, say)
        runs = measure(model, program, chosen, caps, rounds, work, repeater, prompt)
        title = full_scale.title_of("servers", name, scheme, "repeating" if repeating else "")
        rows = keep_traces(folder, title, rows_of(runs, model.stat().st_size, chosen))
    report.write(folder, title, rows)
    report.record(folder, title, command, seed=0)


def _chosen(names: Sequence[str]) -> list[System]:
    known = gguf_systems.available()
    for name in names:
        if name not in known:
            raise FlashMoEError(f"no system is called {name!r}: choose from {', '.join(known)}")
        if not known[name].installed():
            raise FlashMoEError(f"{name} is not here: let {known[name].program} name its program")
    if names:
        return [known[name] for name in names]
    usual = [system for system in known.values() if system.usual]
    for system in usual:
        if not system.installed():
            say(f"{system.name} is left out: {system.program} does not name its program")
    return [system for system in usual if system.installed()]


def measure(
    model: Path,
    program: Path,
    systems: Sequence[System],
    caps: Sequence[float],
    rounds: int,
    traces: Path,
    repeater: Repeater,
    prompt: tuple[int, ...] = PROMPT,
    new_tokens: int = NEW_TOKENS,
) -> list[Run]:
    """Every system at every cap and at none, in turn, `rounds` times; the drive asked before each.

    What takes minutes runs once: a row says how many rounds it had. What was disturbed is measured
    again by `repeater`.

    program: llama-server, beside which the build's other programs lie. traces: the folder where
        runs under a cap below the file's size are recorded: a run that is recorded does not stand
        aside where all fits, so others would not be the user's own.
    """
    dense_bytes, expert_bytes = gguf_file.sizes(model)
    size = model.stat().st_size
    threads = os.cpu_count() or 1
    runs = []
    slow: set[tuple[str, float | None]] = set()
    for number in range(rounds):
        for share in (*caps, None):
            cap_bytes = int(share * size) if share else None
            recorded = traces if share and share < 1 else None
            work = Work(program.parent, model, dense_bytes, prompt, new_tokens, threads, cap_bytes)
            for system in systems:
                if (system.name, share) in slow:
                    continue
                say(f"round {number + 1} of {rounds}: {system.name}, cap {share or 'none'}")
                run = repeater.least_disturbed(
                    partial(_attempt, system, work, recorded, expert_bytes)
                )
                if run["seconds"] > REPEATED_SECONDS:
                    slow.add((system.name, share))
                say(f"{run['outcome']}, {run.get('tokens_per_second')} token/s")
                about = {"cap_share": share, "cap_bytes": cap_bytes, "system": system.name}
                runs.append(about | run)
    return runs


def _attempt(system: System, work: Work, traces: Path | None, expert_bytes: int) -> Run:
    """One run on an empty page cache, recorded where there is a folder for traces."""
    drive = _drive(work.model, expert_bytes) if work.cap_bytes else None
    drop_all()
    # of its own: the run that is kept must have made the trace that is kept
    trace = traces / f"{uuid4().hex}.npz" if traces else None
    watch, started = Watch(), time.perf_counter()
    outcome = _run(system, replace(work, trace=trace))
    taken = {"seconds": time.perf_counter() - started, "drive_bytes_per_second": drive}
    return outcome | watch.since() | taken


def _run(system: System, work: Work) -> Run:
    """What refuses the file or the limit has that for its outcome; llama.cpp must not fail."""
    try:
        return system.run(work)
    except FlashMoEError as error:
        if not (system.program or system.is_ours or system.may_fail):
            raise
        return {"outcome": str(error)}


def _drive(model: Path, expert_bytes: int) -> float | None:
    if ssd.fio_path() is None:
        return None
    return ssd.read_speed(model, expert_bytes, full_scale.FIO_SECONDS / 2)


def rows_of(runs: list[Run], size_bytes: int, chosen: Sequence[System] = ()) -> list[Run]:
    """A row for each cap and system: medians of the rounds with their range, and the roofline.

    The hit rate is the first round's, as are the slots and the trace: so a replay gives it exactly.
    """
    systems = gguf_systems.available() | {system.name: system for system in chosen}
    plain = [run["token_ids"] for run in runs if run["system"] == PLAIN and "token_ids" in run]
    expected = plain[0] if plain else None
    rows = []
    for key in dict.fromkeys((run["cap_share"], run["system"]) for run in runs):
        same = [run for run in runs if (run["cap_share"], run["system"]) == key]
        done = [run for run in same if run["outcome"] == "ok"]
        speeds = [run["tokens_per_second"] for run in done]
        row = {
            "cap_share": key[0],
            "cap_bytes": same[0]["cap_bytes"],
            "file_bytes": size_bytes,
            "system": key[1],
            "outcome": "ok" if done else same[0]["outcome"],
            "rounds": len(done),
            "tokens_per_second": np.median(speeds) if done else None,
            "tokens_per_second_min": min(speeds, default=None),
            "tokens_per_second_max": max(speeds, default=None),
        }
        for name in (
            *("prompt_seconds", "ready_seconds", "peak_memory_bytes"),
            *("bytes_per_token", "drive_bytes_per_second", "own_tokens_per_second"),
        ):
            values = [run[name] for run in done if run.get(name) is not None]
            row[name] = float(np.median(values)) if values else None
        for name in ("hit_rate", "slots_per_layer", "trace"):
            row[name] = done[0].get(name) if done else None
        texts = [run["token_ids"] for run in done if "token_ids" in run]
        row["same_output"] = all(ids == expected for ids in texts) if texts and plain else None
        row |= disturbance.columns(done)
        rows.append(row)
    compute_seconds = _arithmetic_seconds(rows)
    for row in rows:
        clock = systems[row["system"]].clock
        rivals = [
            r["tokens_per_second"]
            for r in rows
            if r["cap_share"] == row["cap_share"]
            and systems[r["system"]].is_ours
            and systems[r["system"]].clock == clock
        ]
        speed, our_speed = row["tokens_per_second"], rivals[0] if rivals else None
        row["flashmoe_speedup"] = our_speed / speed if speed and our_speed else None
        row |= _roofline(row, compute_seconds)
    return rows


def keep_traces(folder: Path, title: str, rows: list[Run]) -> list[Run]:
    """Write the rows' traces beside the table; rows that name these files."""
    kept = []
    for row in rows:
        name = f"trace-{title}-{row['cap_share']}.npz" if row["trace"] else None
        if name:
            trace.load(row["trace"]).save(folder / name)
        kept.append(row | {"trace": name})
    return kept


def _arithmetic_seconds(rows: list[Run]) -> float | None:
    """What a token takes where all fits: the least that any system shows without a cap."""
    free = [row["tokens_per_second"] for row in rows if row["cap_share"] is None]
    return min((1 / speed for speed in free if speed), default=None)


def _roofline(row: Run, compute_seconds: float | None) -> Run:
    """The least seconds that a token can take: of the bytes it read at fio's speed, or arithmetic.

    The bytes are those that the system itself had read while it decoded, guesses included.
    """
    read, drive = row["bytes_per_token"], row["drive_bytes_per_second"]
    speed = row["tokens_per_second"]
    if read is None or not drive or not compute_seconds or not speed:
        return {"roofline_tokens_per_second": None, "share_of_roofline": None}
    floor = max(read / drive, compute_seconds)
    return {"roofline_tokens_per_second": 1 / floor, "share_of_roofline": speed * floor}
