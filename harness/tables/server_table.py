"""llama-server with FlashMoE under it and without, on one GGUF file, under real caps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flashmoe import trace
from flashmoe.engines.transformers.checkpoints.named_models import config_of
from harness.progress import say
from harness.report import report
from harness.runs import gguf_file
from harness.runs.job import FIRST_TOKEN
from harness.runs.page_cache import drop_all
from harness.runs.self_routing_weights import SteeredWeights
from harness.runs.server_run import ServerRun, silent
from harness.tables import full_scale

CAPS = (0.5, 0.75)  # shares of the file
PROMPT_TOKENS, NEW_TOKENS = 160, 48
# What a run without FlashMoE is given: with its default, repacking, it is killed by the caps.
PLAIN, DEFAULT, OURS = "llama-server --no-repack", "llama-server", "flashmoe run llama-server"


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
) -> None:
    """Write the file (given back but for `stores`), run all in turn, report."""
    routing = full_scale.shipped_routing(name)
    recorded = trace.load(routing.trace).named(routing.sequence)
    prefix = recorded.first(PROMPT_TOKENS + NEW_TOKENS)
    with report.scratch(stores or folder) as work:
        model = (stores or work) / f"steered-{name}-{scheme}.gguf"
        if not model.exists():
            say(f"writing {name} with random weights and solved routers")
            partial = model.with_suffix(".partial")
            gguf_file.write(SteeredWeights(config_of(name), 0, prefix), partial, scheme)
            partial.rename(model)
        size = model.stat().st_size
        runs: list[dict[str, Any]] = []
        for number in range(rounds):
            for share in (*caps, None):
                for system in (PLAIN, OURS, DEFAULT):
                    cap_bytes = int(share * size) if share else None
                    say(f"round {number + 1} of {rounds}: {system}, cap {share or 'none'}")
                    outcome = _run(system, program, model, cap_bytes)
                    say(f"{outcome['outcome']}, {outcome.get('tokens_per_second')} token/s")
                    about = {"cap_share": share, "cap_bytes": cap_bytes, "system": system}
                    runs.append(about | outcome)
    title = full_scale.title_of("servers", name, scheme)
    report.write(folder, title, _rows(runs, size))
    report.record(folder, title, command, seed=0)


def _run(system: str, program: Path, model: Path, cap_bytes: int | None) -> dict[str, Any]:
    drop_all()
    threads = str(os.cpu_count())
    extra = ("--no-repack",) if system == PLAIN else ()
    prompt = list(range(FIRST_TOKEN, FIRST_TOKEN + PROMPT_TOKENS))
    run = ServerRun(
        program,
        model,
        "auto" if system == OURS else None,
        prompt,
        NEW_TOKENS,
        cap_bytes,
        silent(("-c", "1024", "-t", threads, *extra)),
    )
    return run.measure()


def _rows(runs: list[dict[str, Any]], size_bytes: int) -> list[dict[str, Any]]:
    """A row for each cap and system: medians of the rounds with their range."""
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
            "tokens_per_second": np.median(speeds) if done else None,
            "tokens_per_second_min": min(speeds, default=None),
            "tokens_per_second_max": max(speeds, default=None),
        }
        for name in ("prompt_seconds", "ready_seconds", "peak_memory_bytes", "hit_rate"):
            values = [run[name] for run in done if run.get(name) is not None]
            row[name] = float(np.median(values)) if values else None
        row["slots_per_layer"] = done[0].get("slots_per_layer") if done else None
        row["same_output"] = all(run["token_ids"] == expected for run in done) if done else None
        rows.append(row)
    for row in rows:
        ours = next(r for r in rows if (r["cap_share"], r["system"]) == (row["cap_share"], OURS))
        speed, our_speed = row["tokens_per_second"], ours["tokens_per_second"]
        row["flashmoe_speedup"] = our_speed / speed if speed and our_speed else None
    return rows
