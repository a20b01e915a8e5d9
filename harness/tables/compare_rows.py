"""The rows of a comparison: medians of its runs, rooflines, and whose tokens are whose."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from harness.runs import disturbance
from harness.runs.contenders import Contender, Run
from harness.runs.same_weights import WEIGHTS


def rows_of(
    runs: Sequence[Run], compared: Sequence[Contender], prompts: Sequence[int]
) -> list[Run]:
    """A row for each weights, limit and system: medians of the rounds."""
    by_name = {contender.name: contender for contender in compared}
    keys = dict.fromkeys((run["weights"], run["cap_share"], run["system"]) for run in runs)
    each = {name: [run for run in runs if run["weights"] == name] for name, _, _ in keys}
    fastest = {name: _fastest_seconds(those) for name, those in each.items()}
    drives = {name: _drive(those) for name, those in each.items()}
    rows = []
    for weights, share, system in keys:
        all_runs = [
            run
            for run in runs
            if (run["weights"], run["cap_share"], run["system"]) == (weights, share, system)
        ]
        decoded = [run for run in all_runs if not run["only_first"]]
        done = [run for run in decoded if run["outcome"] == "ok"]
        speeds = [run["tokens_per_second"] for run in done]
        failed = next((run["outcome"] for run in decoded if run["outcome"] != "ok"), "ok")
        row = {
            "weights": weights,
            "bits": WEIGHTS[weights][2],
            "cap_share": share,
            "cap_bytes": all_runs[0]["cap_bytes"],
            "system": system,
            "clock": by_name[system].clock,
            "outcome": failed,
            "rounds": len(done),
            "tokens_per_second": _median(speeds),
            "tokens_per_second_min": min(speeds, default=None),
            "tokens_per_second_max": max(speeds, default=None),
        }
        for prompt_tokens in prompts:
            these = [run for run in all_runs if run["prompt_tokens"] == prompt_tokens]
            first = [run["first_token_seconds"] for run in these if run["outcome"] == "ok"]
            row[f"first_token_{prompt_tokens}_seconds"] = _median(first)
            if prompt_tokens != prompts[0]:  # that of the first is the row's
                outcomes = [run["outcome"] for run in these if run["outcome"] != "ok"]
                row[f"first_token_{prompt_tokens}_outcome"] = (outcomes or ["ok"])[0]
        for name in ("load_seconds", "bytes_per_token", "hit_rate", "own_tokens_per_second",
                     "drive_bytes_per_second"):  # fmt: skip
            row[name] = _median([run.get(name) for run in done])
        peaks = [run["peak_memory_bytes"] for run in all_runs if run.get("peak_memory_bytes")]
        row["peak_memory_bytes"] = max(peaks, default=None)
        row |= _roofline(done, drives[weights], fastest[weights]) | _same(
            done, runs, by_name[system]
        )
        rows.append(row | disturbance.columns(done))
    return rows


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def _fastest_seconds(runs: Sequence[Run]) -> float:
    """What a token takes where nothing is read: the least that any of these runs tells."""
    told = [run.get("arithmetic_seconds") for run in runs]
    seen = [
        1 / run["tokens_per_second"]
        for run in runs
        if run["outcome"] == "ok" and not run["only_first"]
    ]
    return min([value for value in told if value] + seen, default=0.0)


def _drive(runs: Sequence[Run]) -> float | None:
    """fio's fastest: others may share the drive, so that a single look is no bound."""
    return max(filter(None, (run["drive_bytes_per_second"] for run in runs)), default=None)


def _roofline(done: Sequence[Run], drive: float | None, arithmetic_seconds: float) -> Run:
    """The least seconds of a token: of the bytes that it read at fio's speed, or of arithmetic."""
    floors = [
        (max(run["bytes_per_token"] / drive, arithmetic_seconds), run)
        for run in done
        if drive and run.get("bytes_per_token") is not None
    ]
    return {
        "roofline_tokens_per_second": _median([1 / floor for floor, _ in floors]),
        "share_of_roofline": _median([f * run["tokens_per_second"] for f, run in floors]),
    }


def _same(done: Sequence[Run], runs: Sequence[Run], contender: Contender) -> Run:
    """Are its tokens those of the system that multiplies by the same kernels?"""
    expected = next(
        (
            run["token_ids"]
            for run in runs
            if run["system"] == contender.like and run.get("token_ids") and not run["only_first"]
            and done and run["weights"] == done[0]["weights"]
        ),
        None,
    )  # fmt: skip
    given = [run["token_ids"] for run in done if run.get("token_ids")]
    if not expected or not given:
        return {"same_output": None}
    return {
        "same_output": all(
            all(a == b for a, b in zip(tokens, expected, strict=False)) for tokens in given
        )
    }
