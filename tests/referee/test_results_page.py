"""The page of all results: what it says of rows that the test made, and of those in git."""

from __future__ import annotations

import json
import math
import re

import made_results
import pytest
from made_results import EVIL, RECORD, row

from flashmoe.errors import FlashMoEError
from harness.__main__ import main
from harness.report import report
from harness.report.page import build, columns, datapoints
from harness.report.page.advice import advice
from harness.report.page.behind import better_policies, faster_rows
from harness.report.page.speeds import Ranged, contests, ratio


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    return made_results.make()


def sentences() -> list[tuple[str, str, str]]:
    return [(said.where, said.who, said.why) for each in advice() for said in each.sentences]


def test_advice_says_who_is_first_at_which_memory_and_by_how_much(results):
    assert sentences() == [
        ("bf16 weights, memory for 25 % of the model", "FlashMoE under transformers",
         "2 times as fast as the next, DAOP, re-implemented"),
        ("bf16 weights, memory for 120 % of the model", "plain llama.cpp, memory-mapped",
         "1.6 times as fast as the next, FlashMoE, fast arithmetic"),
    ]  # fmt: skip


def test_rows_of_two_tables_are_compared_through_flashmoe(results):
    contest = contests()[-1]
    ranked = contest.ranked()
    assert [each.system for each in ranked][:2] == ["llama-cpp", "flashmoe-fast"]
    lead = ratio(*ranked[:2])
    assert lead.value == pytest.approx(2 / 1.25)
    assert lead.low == pytest.approx((1 / 0.6) / (1 / 0.7))
    assert lead.high == pytest.approx((1 / 0.4) / (1 / 0.9))


def test_two_whose_range_reaches_one_are_level(results):
    rows = [row("flashmoe", 0.4, 4), row("daop", 0.4, 3.8, (1.05, 0.95, 1.2))]
    report.write(results, "speedups-m", rows)
    (results / "speedups-m-others.csv").unlink()
    assert sentences()[0][1:] == (
        "DAOP, re-implemented or FlashMoE under transformers",
        "the rounds cannot tell the two apart",
    )  # fmt: skip


def test_a_system_alone_is_no_contest_and_one_that_did_not_finish_is_told(results):
    report.write(results, "speedups-m-others", [row("flashmoe", 0.5, 4)])
    killed = row("flashmoe", 1.2, None, (None,) * 3, outcome="out of memory", rounds=0)
    rows = [killed, row("os-paging", 1.2, 3, (None,) * 3)]
    report.write(results, "speedups-m", rows)
    assert sentences() == [
        ("bf16 weights, memory for 120 % of the model", "transformers, memory-mapped",
         "nothing else finished")
    ]  # fmt: skip
    (lost,), own = faster_rows()
    assert (lost.row.system, lost.over, lost.baseline.outcome) == (
        "os-paging",
        None,
        "out of memory",
    )
    assert own == []


def test_every_row_that_is_faster_than_flashmoe_is_listed_as_a_rival_or_its_own_option(results):
    rivals, own = faster_rows()
    assert [(each.row.system, each.over) for each in rivals] == [
        ("llama-cpp", Ranged(2, 1 / 0.6, 1 / 0.4))
    ]
    assert [(each.row.system, each.level) for each in own] == [("flashmoe-fast", False)]


def test_a_policy_that_hits_more_than_learned_is_listed_and_belady_is_not(results):
    case = {"trace": "t", "part": "p", "start": "cold", "capacity": 0.25}
    rates = {"learned": 0.5, "lru": 0.4, "static": 0.6, "belady": 0.9}
    rows = [case | {"policy": name, "hit_rate": rate} for name, rate in rates.items()]
    rows += [each | {"capacity": 0.5} for each in rows if each["policy"] != "static"]
    report.write(results, "hit_rates", rows)
    found = better_policies()
    assert list(found.policy) == ["static"]
    assert list(found.points) == pytest.approx([10])


def test_the_committed_results_hold_what_the_page_says_of_them():
    """By the tables' own columns, not by the page's code."""
    rivals, own = faster_rows()
    listed = {(each.row.folder, each.row.table, each.row.system, _cap(each.contest.share))
              for each in rivals + own}  # fmt: skip
    count = 0
    for path in report.RESULTS.glob("*/*.csv"):
        frame = report.read(path.parent, path.stem)
        if "flashmoe_speedup" in frame:
            for _, lost in frame[frame.flashmoe_speedup < 1].iterrows():
                count += 1
                key = (path.parent.name, path.stem, lost.system, _cap(lost.cap_share))
                assert key in listed
    assert count > 10


def _cap(share: float) -> str:
    return "none" if math.isnan(share) else f"{share:.3f}"


def test_what_tables_and_records_hold_is_text_and_no_script(results):
    text = build.text()
    assert EVIL not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 3
    hashes = re.search(r"script-src([^\"]*)", text)[1].split()
    assert len(hashes) == len(re.findall(r"<script>", text))
    assert "unsafe" not in " ".join(hashes)


def test_a_script_that_would_end_early_is_refused():
    with pytest.raises(ValueError, match="script"):
        build._inline("let a = '</SCRIPT>';")


def test_the_same_results_give_the_same_page_and_other_results_another_digest(results):
    before = build.digest()
    assert build.text() == build.text()
    report.provenance(results, "speedups-m", RECORD | {"date": "2026-11-27"})
    assert build.digest() != before


def test_the_command_builds_the_page_and_the_index(results, capsys):
    main(["report"])
    assert capsys.readouterr().out.strip() == str(report.RESULTS / "index.html")
    assert "What to run on which machine" in (report.RESULTS / "index.html").read_text()
    assert "here-avx2-full-scale" in (report.RESULTS / "README.md").read_text()


def test_the_committed_page_is_of_the_committed_results_and_not_too_large():
    page = report.RESULTS / build.NAME
    assert f'<meta name="results" content="{build.digest()}">' in page.read_text()
    assert page.stat().st_size < 2.2e6


def test_a_run_that_was_killed_or_disturbed_is_told_in_place_of_its_speed(results):
    rows = [row("flashmoe", 0.25, 4, disturbed=True), row("daop", 0.25, None, outcome="killed")]
    frame = report.write(results, "speedups-m", rows)
    cells = columns.shown("speedups-m", frame)
    place = cells.headers.index("Decode, token/s")
    assert [each[place].text for each in cells.rows] == ["4, disturbed", "killed"]


def datapoint(speed: float, date: str = "2026-11-27", **machine) -> dict:
    return {
        "date": date, "model": "olmoe-quarter",
        "machine": {"cpu": "A CPU", "cores": 8, "memory_bytes": 32 << 30,
                    "instruction_sets": ["avx2"]} | machine,
        "drive": {"class": "nvme", "random_read_bytes_per_second": 3e9},
        "rows": [
            {"system": "flashmoe", "cap_share": 0.4, "outcome": "ok", "tokens_per_second": speed,
             "share_of_roofline": 0.8, "disturbed": False},
            {"system": "daop", "cap_share": 0.4, "outcome": "ok", "tokens_per_second": 1.0},
        ],
    }  # fmt: skip


def test_a_users_machine_stands_among_all_others(results):
    own = [row("flashmoe", 0.4, 5, model="olmoe-quarter"), row("daop", 0.4, 1, (5, 5, 5))]
    report.write(results, "speedups-olmoe-quarter", own)
    folder = report.RESULTS / "datapoints"
    folder.mkdir()
    for name, point in (("a", datapoint(9, "2026-11-26")), ("b", datapoint(7, cpu=EVIL))):
        (folder / f"{name}.json").write_text(json.dumps(point))
    (standing,) = datapoints.section(datapoints.load())["caps"]
    assert (standing["place"], standing["of"]) == (2, 3)
    speeds = [cells[3].text for cells in standing["table"].rows]
    assert speeds == ["9", "7", "5"]
    assert standing["table"].rows[0][4].text == "9.00"
    text = build.text()
    assert "The newest is number 2 of 3." in text
    assert EVIL not in text


def test_without_datapoints_the_page_says_so_and_a_broken_one_is_named(results):
    assert "None was sent in yet." in build.text()
    folder = report.RESULTS / "datapoints"
    folder.mkdir()
    (folder / "a.json").write_text("[1]")
    with pytest.raises(FlashMoEError, match=r"datapoints/a\.json is no datapoint"):
        build.text()
