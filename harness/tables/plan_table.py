"""What `flashmoe plan` would have said of every committed row, beside what was measured.

Two figures of the formula are fitted to rows: how much of the shorter of reading and computing
shows, and how fast a core multiplies. A table is judged by what the other tables gave.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from math import log
from pathlib import Path
from typing import Any

import numpy as np

from flashmoe.disk import files
from flashmoe.plan import formula, measured
from flashmoe.plan.formula import Speeds
from flashmoe.plan.measured import LEARNED, Curve, Measured
from harness.report import report
from harness.tables.full_scale import PROMPT_TOKENS
from harness.tables.plan_cases import PARTS, Case, committed

TITLE = "plan"
WITHIN = 0.25  # of the measured speed
HIT_RATES = report.RESULTS / "intel-xeon-avx512-2-core-24gib-policies"
_SHARES = np.linspace(0, 1, 21)
_GAINS = np.linspace(1, 12, 23)
# By trace: layers, experts of a layer, experts a token; False: of a small model of this geometry.
_TRACES = {
    "demo": ((16, 64, 8), True),
    "gpt-oss-20b-mmlu": ((24, 32, 4), True),
    "deepseek-v2-lite-prompts": ((26, 64, 6), True),
    "gpt-oss-20b stand-in": ((24, 32, 4), False),
    "deepseek-v2-lite stand-in": ((26, 64, 6), False),
    "qwen3-30b-a3b stand-in": ((48, 128, 8), False),
    "mixtral-8x7b stand-in": ((32, 8, 2), False),
}


def write(folder: Path, command: str) -> None:
    """The table, and what ships with `flashmoe plan`: fitted to all rows."""
    cases = committed()
    rows = [judged(case, fit_to_others(cases, case)) for case in cases]
    shipped = replace(
        fit(cases),
        token_range=_ranges(cases, rows, "uncalibrated_tokens_per_second", "tokens_per_second"),
        first_token_range=_ranges(
            cases, rows, "predicted_first_token_seconds", "first_token_seconds"
        ),
    )
    document = json.dumps(asdict(shipped), indent=1) + "\n"
    files.replace(measured.FILE, lambda file: file.write(document.encode()))
    report.write(folder, TITLE, rows)
    report.record(folder, TITLE, command, within=summary(rows))


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """How many rows are within a quarter of what was measured."""

    def share(column: str, chosen: Iterable[dict[str, Any]]) -> str:
        errors = [abs(row[column]) for row in chosen]
        return f"{sum(error <= WITHIN for error in errors)} of {len(errors)}"

    return {
        "calibrated": share("error", rows),
        "calibrated_by_other_rows": share("error", (r for r in rows if not r["own_parts"])),
        "not_calibrated": share("uncalibrated_error", rows),
        "first_token": share("first_token_error", rows),
    }


def fit_to_others(cases: Sequence[Case], row: Case) -> Measured:
    """What the tables gave that a row is not in."""
    return fit([case for case in cases if case.source != row.source])


def fit(cases: Sequence[Case]) -> Measured:
    """What these rows give."""
    layer_seconds = _layer_seconds()
    plain = Measured(
        source=f"{HIT_RATES.relative_to(report.RESULTS.parent)}/hit_rates.csv, policy {LEARNED}, "
        "cold; the rest fitted to the rows of results/*/plan.csv by `python -m harness plan`",
        curves=tuple(curves()),
        core_bytes_per_second=_core_speeds(cases, layer_seconds),
        layer_seconds=layer_seconds,
        serial_share={},
        prompt_gain={},
        token_range={},
        first_token_range={},
    )
    shares, gains = {}, {}
    for engine in sorted({case.facts.engine for case in cases}):
        mine = [case for case in cases if case.facts.engine == engine]

        def token_error(case: Case, share: float) -> float:
            seconds = token_seconds(case, plain, calibrated_speeds(case, share, 1.0))
            return abs(log(seconds * case.tokens_per_second))

        shares[engine] = _best(mine, _SHARES, token_error)

        def first_error(case: Case, gain: float, share: float = shares[engine]) -> float:
            seconds = first_token_seconds(case, calibrated_speeds(case, share, gain))
            return abs(log(seconds / case.first_token_seconds))

        gains[engine] = _best(mine, _GAINS, first_error)
    return replace(plain, serial_share=shares, prompt_gain=gains)


def curves() -> list[Curve]:
    """Of each trace, the mean of its parts."""
    frame = report.read(HIT_RATES, "hit_rates")
    frame = frame[(frame.policy == LEARNED) & (frame.start == "cold")]
    found = []
    for trace, (geometry, real) in _TRACES.items():
        by_share = frame[frame.trace == trace].groupby("capacity").hit_rate.mean()
        rates = tuple(round(rate, 4) for rate in by_share)
        found.append(Curve(trace, real, geometry, tuple(map(float, by_share.index)), rates))
    return found


def _layer_seconds() -> dict[str, float]:
    """By engine, what a layer takes of a token besides: the demo model's, which has no weights to
    speak of. llama.cpp's was not measured, and is small.
    """
    seconds = []
    for folder in report.folders():
        if (folder / "generation.csv").exists():
            frame = report.read(folder, "generation")
            layers, n_experts, _ = _TRACES["demo"][0]
            whole = frame[(frame.system == "flashmoe") & (frame.slots == n_experts)]
            seconds += [1 / speed / layers for speed in whole.tokens_per_second]
    return {"llama": 0.0, "transformers": round(statistics.median(seconds), 5)}


def _core_speeds(cases: Sequence[Case], layer_seconds: dict[str, float]) -> dict[str, float]:
    """Medians, by the words of `measured.kind_of` and by the first of them; a table counts once."""
    by_table: dict[str, dict[tuple[object, ...], float]] = defaultdict(dict)
    for case in cases:
        bytes_a_token = case.facts.dense_token_bytes + case.facts.touched_bytes
        besides = case.facts.layers * layer_seconds[case.facts.engine]
        speed = bytes_a_token / (case.arithmetic_seconds - besides) / case.cores
        words = measured.kind_of(case.facts, case.arithmetic).split()
        for count in range(1, len(words) + 1):
            by_table[" ".join(words[:count])][case.source, case.system] = speed
    return {
        kind: float(f"{statistics.median(speeds.values()):.3g}")
        for kind, speeds in sorted(by_table.items())
    }


def _best(
    cases: Sequence[Case], choices: Iterable[float], error: Callable[[Case, float], float]
) -> float:
    """The choice with the least mean error."""
    by_choice = {choice: statistics.fmean(error(c, choice) for c in cases) for choice in choices}
    return round(float(min(by_choice, key=lambda choice: by_choice[choice])), 2)


def calibrated_speeds(case: Case, serial_share: float, prompt_gain: float) -> Speeds:
    """With the arithmetic that rows of the same machine told."""
    bytes_a_token = case.facts.dense_token_bytes + case.facts.touched_bytes
    arithmetic = bytes_a_token / case.arithmetic_seconds
    return Speeds(arithmetic, 0.0, case.drive_bytes_per_second, serial_share, prompt_gain)


def token_seconds(case: Case, figures: Measured, speeds: Speeds) -> float:
    return formula.token_seconds(case.facts, predicted_hit_rate(case, figures), speeds)


def predicted_hit_rate(case: Case, figures: Measured) -> float:
    """On the curve of the routing that the row had."""
    curve = next(curve for curve in figures.curves if curve.trace == case.trace)
    return curve.at(case.share)


def first_token_seconds(case: Case, speeds: Speeds) -> float:
    return formula.first_token_seconds(case.facts, PROMPT_TOKENS, speeds)


def _ranges(
    cases: Sequence[Case], rows: Sequence[dict[str, Any]], predicted: str, real: str
) -> dict[str, tuple[float, float]]:
    """By engine, from which to which part of the predicted eight of ten rows lie."""
    ratios: dict[str, list[float]] = defaultdict(list)
    for case, row in zip(cases, rows, strict=True):
        ratios[case.facts.engine].append(row[real] / row[predicted])
    ends = {engine: np.quantile(values, (0.1, 0.9)) for engine, values in ratios.items()}
    return {engine: (round(float(a), 2), round(float(b), 2)) for engine, (a, b) in ends.items()}


def judged(case: Case, others: Measured) -> dict[str, Any]:
    """A row of the table. others: what all tables but this row's gave."""
    engine = case.facts.engine
    speeds = calibrated_speeds(case, others.serial_share[engine], others.prompt_gain[engine])
    core = measured.core_speed(others, case.facts, case.arithmetic)
    uncalibrated = replace(
        speeds, arithmetic=core * case.cores, layer_seconds=others.layer_seconds[engine]
    )
    calibrated_tokens = 1 / token_seconds(case, others, speeds)
    plain_tokens = 1 / token_seconds(case, others, uncalibrated)
    first_seconds = first_token_seconds(case, speeds)
    return {
        "measured_in": case.folder,
        "of_table": case.table,
        "system": case.system,
        "resident_share": case.share,
        "drive_bytes_per_second": case.drive_bytes_per_second,
        "arithmetic_from": case.arithmetic_from,
        "own_parts": case.arithmetic_from == PARTS,
        "hit_rate": case.hit_rate,
        "predicted_hit_rate": predicted_hit_rate(case, others),
        "tokens_per_second": case.tokens_per_second,
        "predicted_tokens_per_second": calibrated_tokens,
        "error": calibrated_tokens / case.tokens_per_second - 1,
        "uncalibrated_tokens_per_second": plain_tokens,
        "uncalibrated_error": plain_tokens / case.tokens_per_second - 1,
        "first_token_seconds": case.first_token_seconds,
        "predicted_first_token_seconds": first_seconds,
        "first_token_error": first_seconds / case.first_token_seconds - 1,
    }
