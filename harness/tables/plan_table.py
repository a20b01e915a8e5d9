"""What `flashmoe plan` would have said of every committed row, beside what was measured.

Its figures are fitted to rows (harness/tables/plan_fit.py). So a row is judged twice: by what all
tables but its own gave, and by what the rows of all machines but its own gave.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from flashmoe.disk import files
from flashmoe.plan import measured
from harness.report import report
from harness.tables import plan_fit
from harness.tables.plan_cases import PARTS, Case, committed
from harness.tables.plan_fit import Fit, fit

TITLE = "plan"
WITHIN = 0.25  # of what was measured


def write(folder: Path, command: str) -> None:
    """The table, and what ships with `flashmoe plan`: fitted to all rows."""
    cases = committed()
    by_tables, by_machines = (
        fits_without(cases, of) for of in (lambda case: case.source, lambda case: case.machine)
    )
    rows = [judged(case, by_tables(case), by_machines(case)) for case in cases]
    tokens, first = "tokens_per_second", "first_token_seconds"
    shipped = replace(
        fit(cases).figures,
        token_range=_ranges(cases, rows, f"uncalibrated_{tokens}", tokens),
        first_token_range=_ranges(cases, rows, f"predicted_{first}", first),
    )
    document = json.dumps(asdict(shipped), indent=1) + "\n"
    files.replace(measured.FILE, lambda file: file.write(document.encode()))
    report.write(folder, TITLE, rows)
    report.record(folder, TITLE, command, within=summary(rows))


def fits_without(
    cases: Sequence[Case], part_of: Callable[[Case], Hashable]
) -> Callable[[Case], Fit]:
    """What the other parts gave, for a row of one part; each is fitted once."""

    @cache
    def without(part: Hashable) -> Fit:
        return fit([case for case in cases if part_of(case) != part])

    return lambda case: without(part_of(case))


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """How many rows are within a quarter of what was measured."""

    def share(column: str, chosen: Iterable[dict[str, Any]] = rows) -> str:
        errors = [abs(row[column]) for row in chosen]
        return f"{sum(error <= WITHIN for error in errors)} of {len(errors)}"

    return {
        "calibrated": share("error"),
        "calibrated_by_other_rows": share("error", (r for r in rows if not r["own_parts"])),
        "not_calibrated": share("uncalibrated_error"),
        "not_calibrated_other_machines": share("other_machines_error"),
        "first_token": share("first_token_error"),
        "first_token_other_machines": share("other_machines_first_token_error"),
    }


def _ranges(
    cases: Sequence[Case], rows: Sequence[dict[str, Any]], predicted: str, real: str
) -> dict[str, tuple[float, float]]:
    """By engine, from which to which part of the predicted eight of ten rows lie."""
    ratios: dict[str, list[float]] = defaultdict(list)
    for case, row in zip(cases, rows, strict=True):
        ratios[case.facts.engine].append(row[real] / row[predicted])
    ends = {engine: np.quantile(values, (0.1, 0.9)) for engine, values in ratios.items()}
    return {engine: (round(float(a), 2), round(float(b), 2)) for engine, (a, b) in ends.items()}


def judged(case: Case, others: Fit, other_machines: Fit) -> dict[str, Any]:
    """A row of the table. others: what all tables but this row's gave; and all other machines'."""
    speeds = plan_fit.speeds_of(case, others)
    elsewhere = plan_fit.speeds_of(case, other_machines)
    calibrated = 1 / plan_fit.token_seconds(case, others, plan_fit.calibrated(case, speeds))
    plain = 1 / plan_fit.token_seconds(case, others, speeds)
    unknown = 1 / plan_fit.token_seconds(case, other_machines, elsewhere)
    first = plan_fit.first_token_seconds(case, others, speeds)
    unknown_first = plan_fit.first_token_seconds(case, other_machines, elsewhere)
    return {
        "measured_in": case.folder,
        "of_table": case.table,
        "system": case.system,
        "weights": case.facts.weights,
        "resident_share": case.share,
        "drive_bytes_per_second": case.drive_bytes_per_second,
        "arithmetic_from": case.arithmetic_from,
        "own_parts": case.arithmetic_from == PARTS,
        "hit_rate": case.hit_rate,
        "predicted_hit_rate": plan_fit.curve_of(case, others.figures).at(case.share),
        "tokens_per_second": case.tokens_per_second,
        "predicted_tokens_per_second": calibrated,
        "error": calibrated / case.tokens_per_second - 1,
        "uncalibrated_tokens_per_second": plain,
        "uncalibrated_error": plain / case.tokens_per_second - 1,
        "other_machines_tokens_per_second": unknown,
        "other_machines_error": unknown / case.tokens_per_second - 1,
        "first_token_seconds": case.first_token_seconds,
        "predicted_first_token_seconds": first,
        "first_token_error": first / case.first_token_seconds - 1,
        "other_machines_first_token_seconds": unknown_first,
        "other_machines_first_token_error": unknown_first / case.first_token_seconds - 1,
    }
