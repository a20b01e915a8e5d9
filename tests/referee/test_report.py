"""What is written of a run: its command, its tables, pages, pictures and the index."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from flashmoe.errors import FlashMoEError
from harness import commands
from harness.__main__ import build_parser
from harness.report import charts, index, pictures, report
from harness.report.page import columns, figures

REAL = report.RESULTS
RECORD = {
    "command": "python -m harness x", "date": "2026-11-26", "commit": "0123456789abcdef",
    "uncommitted_changes": False, "versions": {"torch": "2"},
    "machine": {"cpu": "a", "cores": 2, "memory_gib": 24, "file_system": "ext4"},
}  # fmt: skip


def command_line(words: str) -> str:
    return commands.command_line(words.split(), build_parser().parse_args(words.split()))


@pytest.mark.parametrize(
    ("words", "written"),
    [
        ("full-scale olmoe-1b-7b --caps 0.25 0.4 --stores /mnt/a", "--caps 0.25 0.4 --stores DIR"),
        ("full-scale --routing /b/c.npz --sequence c", "full-scale --routing TRACE --sequence c"),
        ("hit-rates --traces=../traces/", "hit-rates --traces=DIR"),
        ("quant --texts texts", "quant --texts DIR"),
        ("hit-rates --cluster dask://a:1", "hit-rates --cluster ADDRESS"),
        ("run flashmoe --prompt a|b", "run flashmoe --prompt 'a|b'"),
    ],
)
def test_provenance_has_the_command_as_given_but_for_paths(words, written):
    assert command_line(words).startswith("python -m harness ")
    assert command_line(words).endswith(written)


def test_the_command_that_runs_one_system_imports_nothing_heavy():
    """It may have little memory: what it needs is imported when it runs."""
    script = (
        "import sys; from harness.__main__ import build_parser; build_parser();"
        "print(*{'torch', 'numpy', 'pandas', 'altair', 'transformers'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout == "\n", run.stderr


@pytest.mark.parametrize(
    ("folder", "above"),
    [
        ("runs", {"report", "tables", "torture", "commands", "demo"}),
        ("report", {"tables", "torture", "commands", "demo"}),
        ("torture", {"tables", "commands"}),
        ("tables", {"torture", "commands"}),
    ],
)
def test_folders_of_the_harness_import_what_is_below(folder, above):
    for path in (Path(commands.__file__).parents[1] / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("harness"):
                rest = (node.module or "").split(".")[1:]
                names = rest[:1] or [alias.name for alias in node.names]
                assert not set(names) & above, path


@pytest.fixture
def results(tmp_path, monkeypatch):
    """One folder of results of a made-up machine."""
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    folder = report.RESULTS / "here-quick"
    rows = [
        {"cap_share": 0.4, "system": "flashmoe", "outcome": "ok", "tokens_per_second": 1.23456,
         "model": "m", "store_bytes": 1, "hit_rate": 0.123456},
        {"cap_share": 0.4, "system": "daop", "outcome": "out of memory", "model": "m"},
    ]  # fmt: skip
    report.write(folder, "speedups-m", rows)
    report.write(folder, "tokens-speedups-m", [{"token": 1, "milliseconds": 1.23456}])
    report.write(folder, "soak", [{"seconds": 1.0, "rss_bytes": 5 << 20}])
    report.provenance(folder, "speedups-m", RECORD)
    report.provenance(folder, "soak", RECORD)
    return folder


def test_times_and_speeds_are_written_with_four_digits_all_else_with_six(results):
    table = report.read(results, "speedups-m")
    assert table.tokens_per_second[0] == 1.235
    assert table.hit_rate[0] == 0.123456
    assert report.read(results, "tokens-speedups-m").milliseconds[0] == 1.235


def test_the_index_is_one_row_a_run(results):
    index.write()
    text = (results.parent / "README.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| [here-quick]")]
    assert len(rows) == 2
    assert "(here-quick/tokens-speedups-m.csv) | measured | 2026-11-26 | 0123456789ab |" in rows[0]


def test_the_committed_index_is_fresh_and_has_every_table():
    text = (report.RESULTS / "README.md").read_text()
    assert text == index.text()
    n_records = sum(len(report.records(folder)) for folder in report.folders())
    assert len(text.splitlines()) <= n_records + 50  # a line each, and what is told beside them
    for path in report.RESULTS.glob("*/*.csv"):
        assert f"({path.parent.name}/{path.name})" in text


WORDS = ("measured", "replayed", "recorded", "predicted", "throttled")


def test_kinds_of_tables_have_a_note_a_title_and_at_most_eight_columns():
    for kind, shown in (columns.COLUMNS | columns.SPECIAL_COLUMNS).items():
        assert report.evidence(kind) in WORDS
        assert len(shown) <= 8
        assert shown or kind in columns.DIGESTS
    notes = Path(report.__file__).parent / "notes"
    assert {path.stem for path in notes.iterdir()} == set(columns.COLUMNS) == set(figures.TITLES)
    assert set(charts.CHARTS) <= set(columns.COLUMNS)


def test_the_committed_pictures_are_those_that_the_documents_show():
    assert sorted(report.RESULTS.glob("*/*.png")) == sorted(pictures.shown())
    assert not list(report.RESULTS.glob("*/*.svg"))


def test_a_picture_that_a_document_shows_is_drawn_from_its_csv(results):
    folder = min(path.parent for path in REAL.glob("*/timeline-*.csv"))
    table = min(folder.glob("timeline-*.csv"))
    (results / table.name).write_bytes(table.read_bytes())
    link = f"![a](results/here-quick/{table.stem}.png)"
    (results.parents[1] / "README.md").write_text(link)
    assert pictures.draw() == [results / f"{table.stem}.png"]
    assert (results / f"{table.stem}.png").stat().st_size > 1000


def test_a_link_to_a_picture_that_cannot_be_drawn_is_said(results):
    (results.parents[1] / "README.md").write_text("![a](results/here-quick/soak.png)")
    with pytest.raises(FlashMoEError, match=r"soak\.png, which cannot be drawn"):
        pictures.draw()


def test_records_are_found_for_what_a_run_writes_beside_its_table():
    assert report.record_of("timeline-m") == report.record_of("packing-m") == "speedups-m"
    assert report.record_of("tokens-speedups-m-int4") == "speedups-m-int4"
    assert report.record_of("faults-kills") == "faults"
    assert report.record_of("reader") == "ssd"


def test_a_record_replaces_that_of_the_run_before(results):
    report.provenance(results, "soak", RECORD | {"date": "2027-01-01"})
    records = json.loads((results / report.RECORDS).read_text())
    assert list(records) == ["speedups-m", "soak"]
    assert records["soak"]["date"] == "2027-01-01"


def test_units_are_chosen_by_the_largest_value():
    frame = pd.DataFrame({"a_bytes": [2e10, 1e9], "b_bytes": [2e6, 0], "c_bytes": [48 << 10, None]})
    assert columns.table(frame).headers == ["A, GB", "B, MB", "C, kB"]
    assert [cell.text for cell in columns.table(frame).rows[1]] == ["1", "0", ""]
