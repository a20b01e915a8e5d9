"""A plan is judged by rows that it was not fitted to, and what ships is what all rows gave."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flashmoe.engines.model_facts import ModelFacts
from flashmoe.plan import measured
from harness.report import report
from harness.tables import plan_table
from harness.tables.plan_cases import RESIDENT, Case

FACTS = ModelFacts(
    engine="llama", architecture="x", weights="q4_k", layers=16, n_experts=64, top_k=8,
    experts_bytes=6_400_000, dense_bytes=10**6, dense_token_bytes=10**5, beside_bytes=0,
    parameters=10**7, kv_bytes=0, window_kv_bytes=0, window_tokens=0, least_bytes=1,
    reserve_bytes=1,
)  # fmt: skip
SHARE, GAIN = 0.35, 3.0


def cases() -> list[Case]:
    """Rows that obey the formula, on drives and cores of several speeds."""
    made = []
    figures = replace(measured.load(), curves=tuple(plan_table.curves()))
    for number, drive in enumerate((10**6, 3 * 10**6, 10**7)):
        for share in (0.2, 0.5):
            case = Case(
                "a-folder", f"servers-{number}", "ours", FACTS, "exact", "demo", share, drive, 2,
                0.5, 1.0, 1.0, 0.2, RESIDENT,
            )  # fmt: skip
            speeds = plan_table.calibrated_speeds(case, SHARE, GAIN)
            tokens = 1 / plan_table.token_seconds(case, figures, speeds)
            first = plan_table.first_token_seconds(case, speeds)
            made.append(replace(case, tokens_per_second=tokens, first_token_seconds=first))
    return made


def test_a_fit_finds_what_rows_were_made_with():
    figures = plan_table.fit(cases())
    assert figures.serial_share == {"llama": SHARE}
    assert figures.prompt_gain == {"llama": GAIN}
    speed = (FACTS.dense_token_bytes + FACTS.touched_bytes) / 0.2 / 2
    assert figures.core_bytes_per_second["llama exact q4_k"] == pytest.approx(speed, rel=0.01)


def test_a_row_is_judged_by_other_tables():
    """A table whose rows were made otherwise does not hide that."""
    honest = cases()
    twice = 2 * honest[0].tokens_per_second
    odd = replace(honest[0], table="servers-odd", tokens_per_second=twice)
    row = plan_table.judged(odd, plan_table.fit_to_others([*honest, odd], odd))
    assert row["error"] == pytest.approx(-0.5, abs=0.01)
    summary = plan_table.summary([row, plan_table.judged(honest[1], plan_table.fit(honest))])
    assert summary["calibrated"] == "1 of 2"


def test_what_ships_has_the_curves_of_the_committed_hit_rates():
    assert list(measured.load().curves) == plan_table.curves()


def test_nine_of_ten_committed_rows_are_within_a_quarter():
    (folder,) = (path.parent for path in report.RESULTS.glob(f"*/{plan_table.TITLE}.csv"))
    rows = report.read(folder, plan_table.TITLE)
    error = rows.predicted_tokens_per_second / rows.tokens_per_second - 1
    assert (error.abs() <= plan_table.WITHIN).mean() >= 0.9
    told = report.records(folder)[plan_table.TITLE]["within"]
    assert told == plan_table.summary(rows.to_dict("records"))
    for table in rows.of_table.unique():
        assert list(report.RESULTS.glob(f"*/{table}.csv"))
