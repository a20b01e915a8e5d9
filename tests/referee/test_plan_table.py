"""A plan is judged by rows that it was not fitted to, and what ships is what all rows gave."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flashmoe.engines.model_facts import ModelFacts
from flashmoe.plan import formula, measured
from harness.report import report
from harness.tables import plan_fit, plan_table
from harness.tables.plan_cases import RESIDENT, Case
from harness.tables.plan_fit import Fit

FACTS = ModelFacts(
    engine="llama", architecture="x", weights="q4_k", layers=16, n_experts=64, top_k=8,
    experts_bytes=6_400_000, dense_bytes=10**6, dense_token_bytes=10**5, beside_bytes=0,
    parameters=22 * 10**6, expert_parameters=12 * 10**6, kv_bytes=0, window_kv_bytes=0,
    window_tokens=0, least_bytes=1, reserve_bytes=1,
)  # fmt: skip
SHARE, MEMORY, NEW_MEMORY = 0.35, 1e9, 1e9


def cases() -> list[Case]:
    """Rows that obey the formula, on drives of several speeds; two of the machines are older."""
    known = measured.load()
    figures = replace(
        known,
        curves=tuple(plan_fit.curves()),
        core_seconds_per_weight={"llama packed": 1e-9},
        slower_without_avx512=2.0,
        serial_share={"llama": SHARE},
        prompt_core_seconds_per_weight={"llama packed": 1e-10},
        prompt_slower_without_avx512={"llama": 3.0},
    )
    truth = Fit(figures, MEMORY, NEW_MEMORY)
    made = []
    for number, drive in enumerate((10**6, 3 * 10**6, 10**7, 2 * 10**7)):
        for share in (0.2, 0.5):
            case = Case(
                f"machine-{number}-24gib-full-scale", f"servers-{number}", "ours", FACTS, "exact",
                "demo", share, drive, 2, number < 2, 0.5, 1.0, 1.0, 1.0, RESIDENT,
            )  # fmt: skip
            speeds = plan_fit.speeds_of(case, truth)
            made.append(
                replace(
                    case,
                    arithmetic_seconds=formula.arithmetic_seconds(FACTS, speeds),
                    tokens_per_second=1 / plan_fit.token_seconds(case, truth, speeds),
                    first_token_seconds=plan_fit.first_token_seconds(case, truth, speeds),
                )
            )
    return made


def test_a_fit_finds_rows_again_that_were_made_by_the_formula():
    fitted = plan_fit.fit(cases())
    assert fitted.figures.serial_share == {"llama": SHARE}
    for case in cases():
        speeds = plan_fit.speeds_of(case, fitted)
        tokens = 1 / plan_fit.token_seconds(case, fitted, speeds)
        assert tokens == pytest.approx(case.tokens_per_second, rel=0.05)
        first = plan_fit.first_token_seconds(case, fitted, speeds)
        assert first == pytest.approx(case.first_token_seconds, rel=0.1)


def test_a_row_is_judged_by_other_tables():
    """A table whose rows were made otherwise does not hide that."""
    honest = cases()
    twice = 2 * honest[0].tokens_per_second
    odd = replace(honest[0], table="servers-odd", tokens_per_second=twice)
    others = plan_table.fits_without([*honest, odd], lambda case: case.source)
    row = plan_table.judged(odd, others(odd), others(odd))
    assert row["error"] == pytest.approx(-0.5, abs=0.03)
    other = plan_table.judged(honest[1], others(honest[1]), others(honest[1]))
    assert plan_table.summary([row, other])["calibrated"] == "1 of 2"


def test_what_ships_has_the_curves_of_the_committed_hit_rates():
    assert list(measured.load().curves) == plan_fit.curves()


def test_as_many_committed_rows_are_within_a_quarter_as_is_told():
    (folder,) = (path.parent for path in report.RESULTS.glob(f"*/{plan_table.TITLE}.csv"))
    rows = report.read(folder, plan_table.TITLE)
    error = rows.predicted_tokens_per_second / rows.tokens_per_second - 1
    assert (error.abs() <= plan_table.WITHIN).mean() >= 0.9
    told = report.records(folder)[plan_table.TITLE]["within"]
    assert told == plan_table.summary(rows.to_dict("records"))
    page = (report.RESULTS.parent / "docs" / "plan.md").read_text()
    assert all(f"| {count}" in page for count in told.values())
    for table in rows.of_table.unique():
        assert list(report.RESULTS.glob(f"*/{table}.csv"))
