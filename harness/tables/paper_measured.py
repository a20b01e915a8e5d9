"""The paper's figures of its engine, beside what the committed full-size tables hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from harness.report import report

# Of engines that wait for a missing expert without having read it ahead.
WAITING = ("on-demand", "flashmoe-lru", "flashmoe-no-prefetch")
PARTS = ["wait_ms", "experts_ms", "policy_ms", "python_ms", "rest_of_model_ms"]
PAPER = "flashmoe:flashmoe-paper:"  # and a reading: the engine with the paper's policy
LLAMA, LLAMA_OURS = "llama-server --no-repack", "flashmoe run llama-server"
LOAD, PREFILL = "load_seconds", "first_token_seconds"


def figures() -> Iterator[tuple[str, str, dict[str, float]]]:
    """(name, the paper's, ours by where it was measured) of each; without ours: not measured.

    llama.cpp's loading is that of a server until it answers, ours and theirs.
    """
    speedups, servers = _tables("speedups"), _tables("servers")
    yield "share of decode that waits for experts", "over 0.7", _waiting(speedups)
    for what, more, times in (
        ("initial load", [[], []], ("4", "6.8")),
        ("load and prefill", [["prompt_seconds"], [PREFILL]], ("2.5", "4.1")),
    ):
        ratios = _ratios(servers, (LLAMA, LLAMA_OURS), ["ready_seconds", *more[0]])
        yield f"{what} against llama.cpp, times", times[0], ratios
        for system in ("fiddler", "daop"):
            ratios = _ratios(speedups, (system, "flashmoe"), [LOAD, *more[1]])
            yield f"{what} against {system}, times", times[1], ratios
    for model, gain in (("OLMoE", "+0.22"), ("Qwen3", "+0.07")):
        yield f"decode of flashmoe-paper over LRU, {model}", gain, _gains(speedups, model)


def _tables(kind: str) -> dict[str, pd.DataFrame]:
    paths: list[Path] = sorted(report.RESULTS.glob(f"*-full-scale/{kind}-*.csv"))
    return {
        f"{path.stem.removeprefix(kind + '-')} on "
        f"{path.parent.name.removesuffix('-full-scale')}": pd.read_csv(path)
        for path in paths
    }


def _waiting(tables: dict[str, pd.DataFrame]) -> dict[str, float]:
    values = {}
    for where, table in tables.items():
        for row in table[table.system.isin(WAITING)].to_dict("records"):
            total = sum(row[part] for part in PARTS)
            name = f"{where}, cap {row['cap_share']:g}, {row['system']}"
            values[name] = row["wait_ms"] / total
    return values


def _gains(tables: dict[str, pd.DataFrame], model: str) -> dict[str, float]:
    """How much faster than with LRU the engine decodes with the paper's policy, by reading."""
    values = {}
    for where, table in tables.items():
        if not where.startswith(model.lower()):
            continue
        speeds = table.set_index(["cap_share", "system"]).tokens_per_second
        for (cap, system), speed in speeds.items():
            if system.startswith(PAPER) and (cap, "flashmoe-lru") in speeds:
                reading = system.removeprefix(PAPER)
                values[f"{where}, cap {cap:g}, {reading}"] = speed / speeds[cap, "flashmoe-lru"] - 1
    return values


def _ratios(
    tables: dict[str, pd.DataFrame], systems: tuple[str, str], columns: list[str]
) -> dict[str, float]:
    """Seconds of the first system over those of the second, at every cap that both ran under."""
    values = {}
    for where, table in tables.items():
        capped = table[table.cap_share.notna()].set_index(["system", "cap_share"])
        seconds = capped[columns].sum(axis=1, skipna=False).dropna()
        for cap in capped.index.unique("cap_share"):
            theirs, ours = (seconds.get((system, cap)) for system in systems)
            if theirs is not None and ours is not None:
                values[f"{where}, cap {cap:g}"] = float(theirs / ours)
    return values
