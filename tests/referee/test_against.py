"""The ratios of one machine's results beside another's: within its band, outside, not compared."""

from __future__ import annotations

import pytest

from flashmoe.errors import FlashMoEError
from harness.__main__ import main
from harness.report import against, provenance, report
from harness.report.against import NOT_COMPARED, OUTSIDE, WITHIN


def row(system: str, speed: float, **more: object) -> dict[str, object]:
    return {
        "cap_share": 0.4, "system": system, "outcome": "ok", "tokens_per_second": speed,
        "tokens_per_second_min": speed, "tokens_per_second_max": speed, "tokens": 32,
    } | more  # fmt: skip


def speedup(value: float, low: float, high: float) -> dict[str, float]:
    names = "flashmoe_speedup", "flashmoe_speedup_min", "flashmoe_speedup_max"
    return dict(zip(names, (value, low, high), strict=True))


OURS = row("flashmoe", 4.0, hit_rate=0.5, share_of_roofline=0.8, share_min=0.7, share_max=0.9)
OURS |= speedup(1, 1, 1)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """write(name, table=rows, ...): a folder of results."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)

    def write(name, **tables):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for table, rows in tables.items():
            report.write(folder, table, rows)
        report.provenance(folder, "any", {"date": "2026-11-29"})
        return folder

    return write


def told(mine, other, **options):
    found = list(against.compare(mine, other, **options))
    return {(one.row, one.ratio): (one.verdict, one.why) for one in found}


def test_a_ratio_is_within_the_others_range_widened_or_outside(folders):
    def table(ratio: float, share: float, hits: float) -> list[dict[str, object]]:
        ours = OURS | {"share_of_roofline": share, "hit_rate": hits}
        return [ours, row("fiddler", 1.0, **speedup(ratio, 3.0, 5.0))]

    other = folders("there-quick", speedups=table(4.0, 0.8, 0.5))
    for ratio, share, hits, expected in (
        (3.0 * 0.76, 0.7 * 0.76, 0.476, WITHIN),
        (5.0 * 1.24, 0.9 * 1.24, 0.524, WITHIN),
        (3.0 * 0.74, 0.7 * 0.74, 0.474, OUTSIDE),
        (5.0 * 1.26, 0.9 * 1.26, 0.526, OUTSIDE),
    ):
        mine = folders("here-quick", speedups=table(ratio, share, hits))
        assert told(mine, other) == {
            ("0.4, flashmoe", "share_of_roofline"): (expected, ""),
            ("0.4, flashmoe", "hit_rate"): (expected, ""),
            ("0.4, fiddler", "flashmoe_speedup"): (expected, ""),
        }
    wide = told(mine, other, widen=0.5)
    assert wide["0.4, fiddler", "flashmoe_speedup"] == (WITHIN, "")


def test_a_folder_against_its_copy_is_all_within():
    """Of every committed folder, whatever tables it has."""
    for folder in report.folders():
        other = next(f for f in report.folders() if f != folder)
        for path in folder.glob("*.csv"):
            if report.kind_of(path.stem) not in against._KEYS:
                continue
            rows = against._rows(folder, path.stem)
            found = list(against._tables(path.stem, rows, rows, 0.25))
            assert all(one.verdict == WITHIN or "disturbed" in one.why for one in found), path
        counts = [one.verdict for one in against.compare(folder, other)]
        assert set(counts) <= {WITHIN, OUTSIDE, NOT_COMPARED}


def test_what_cannot_be_compared_says_why(folders):
    fast = row("daop", 2.0, **speedup(2, 2, 2))
    other = folders("there-quick", speedups=[OURS, fast], quant=[OURS])
    for own, why in (
        ([OURS], "no such row here"),
        ([OURS, row("daop", 1.0, outcome="out of memory")], "here: out of memory"),
        ([OURS, row("daop", 1.0)], "not measured here"),
        ([OURS, fast | {"disturbed": True}], "disturbed here"),
    ):
        found = told(folders("here-quick", speedups=own), other)
        assert found["0.4, daop", "flashmoe_speedup"] == (NOT_COMPARED, why)
    fewer = told(folders("here-quick", speedups=[OURS | {"tokens": 3}]), other)
    assert fewer["0.4, flashmoe", "hit_rate"] == (NOT_COMPARED, "other tokens were counted")
    assert fewer["0.4, flashmoe", "share_of_roofline"] == (WITHIN, "")
    shy = folders("third-quick", speedups=[OURS | {"disturbed": True}])
    assert told(folders("here-quick", speedups=[OURS]), shy) == {
        ("0.4, flashmoe", "hit_rate"): (NOT_COMPARED, "disturbed there"),
        ("0.4, flashmoe", "share_of_roofline"): (NOT_COMPARED, "disturbed there"),
    }


def test_a_server_tables_band_is_made_of_its_speeds(folders):
    ours = row("ours", 6.0, tokens_per_second_min=4.0, tokens_per_second_max=8.0)
    plain = row("plain", 1.0, tokens_per_second_min=0.5, tokens_per_second_max=2.0)
    table = [ours | {"flashmoe_speedup": 1.0}, plain | {"flashmoe_speedup": 6.0}]
    folder = folders("there-full-scale", **{"servers-m": table})
    (one,) = against.compare(folders("here-full-scale"), folder)
    assert (one.row, one.why) == ("0.4, plain", "no such table here")
    assert (one.low, one.high) == pytest.approx((2.0 * 0.75, 16.0 * 1.25))


def test_a_comparisons_ratio_is_that_of_the_better_engine(folders):
    def table(*speeds: float) -> list[dict[str, object]]:
        names = ("flashmoe", "flashmoe run llama-server", "llama-server")
        each = [row(name, speed, weights="bf16") for name, speed in zip(names, speeds, strict=True)]
        return [*each, row("flashmoe", 9.0, weights="int4")]

    other = folders("there-full-scale", **{"compare-m": table(2.0, 4.0, 1.0)})
    for speeds, verdict in (((4.1, 1.0, 1.0), WITHIN), ((2.0, 4.0, 2.0), OUTSIDE)):
        mine = folders("here-full-scale", **{"compare-m": table(*speeds)})
        (one,) = against.compare(mine, other)
        assert (one.row, one.ratio) == ("bf16, 0.4, llama-server", "flashmoe_speedup")
        assert (one.theirs, one.verdict) == (4.0, verdict)


def test_speeds_of_zero_and_missing_ranges_have_no_band_of_their_own(folders):
    plain = row("plain", 1.0, flashmoe_speedup=6.0, tokens_per_second_max=0.0)
    del plain["tokens_per_second_min"]
    folder = folders("there-full-scale", **{"servers-m": [OURS, plain]})
    found = told(folders("here-full-scale", **{"servers-m": [OURS, plain]}), folder)
    assert found["0.4, plain", "flashmoe_speedup"] == (WITHIN, "")


def test_replayed_hit_rates_are_equal_or_listed(folders):
    one = {"trace": "demo", "part": "p", "start": "cold", "capacity": 0.25}
    rows = [one | {"policy": name, "hit_rate": 0.5} for name in ("lru", "lfu")]
    other = folders("there-policies", hit_rates=rows)
    mine = folders("here-policies", hit_rates=[rows[0], rows[1] | {"hit_rate": 0.50001}])
    assert [found[0] for found in told(mine, other).values()] == [WITHIN, OUTSIDE]
    text = against.text(mine, other)
    assert "cold, 0.25, lfu" in text
    assert "cold, 0.25, lru" not in text


def test_the_command_finds_this_machines_folder_by_the_profile(folders, monkeypatch, capsys):
    other = folders("there-2-core-24gib-quick", speedups=[OURS])
    with pytest.raises(FlashMoEError, match=r"no results in .*-quick: make them"):
        main(["check", "--against", str(other)])
    folders(f"{provenance.machine_slug()}-quick", speedups=[OURS])
    main(["check", "--against", str(other)])
    assert "| within " in capsys.readouterr().out


def test_bad_input_is_refused_in_a_sentence(folders, tmp_path):
    other = folders("there-quick", speedups=[OURS])
    broken = folders("broken-quick", speedups=[OURS])
    (broken / "speedups.csv").write_bytes(b"")
    for words, why in (
        (["--mine", str(other)], "go with --against"),
        (["--against", str(tmp_path / "none")], "no results lie there"),
        (["--against", str(broken), "--mine", str(other)], r"speedups\.csv is no table"),
        (["--against", str(tmp_path / "none"), "--mine", str(other)], "no results lie there"),
        (["--against", str(other), "--mine", str(tmp_path)], "no results lie there"),
        (["--against", str(other), "--mine", str(other)], "compared with itself"),
    ):
        with pytest.raises(FlashMoEError, match=why):
            main(["check", *words])


def test_folders_with_nothing_in_common_give_a_report(folders):
    text = against.text(folders("a-quick", soak=[{"a": 1}]), folders("b-quick", soak=[{"a": 1}]))
    assert text.startswith("# a-quick against b-quick")
