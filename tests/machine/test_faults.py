"""Faults, in small numbers; `nox -s faults` does thousands."""

from __future__ import annotations

from harness.torture import faults


def test_no_fault_of_the_drive_gives_a_wrong_token():
    for row in faults.reads(12):
        assert row["wrong"] == row["hangs"] == row["other"] == 0, row
        assert row["injected"] >= 12
        if row["fault"] in faults.HARMLESS:
            assert row["refused"] == 0
        elif row["fault"] != "end":  # one early end is tried again, two in a row are believed
            assert row["refused"] > 0


def test_no_kill_while_packing_damages_a_store():
    nothing, store = faults.kills(40)
    assert nothing["damaged"] == store["damaged"] == 0
    assert nothing["no store"] > 0
    assert store["whole store"] == 40  # what was there before is there still, or the new one is
