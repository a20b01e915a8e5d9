"""Faults, in small numbers; `nox -s faults` does thousands."""

from __future__ import annotations

from harness.torture import faults, llama_faults


def test_no_fault_of_the_drive_gives_a_wrong_token():
    for row in faults.reads(12):
        assert row["wrong"] == row["hangs"] == row["other"] == 0, str(row)
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


def test_no_fault_of_the_drive_gives_llama_cpps_server_a_wrong_token():
    """Each failure is one sentence and that request's end; the next one is right."""
    for row in llama_faults.reads(3):
        assert row["wrong"] == row["hangs"] == 0 and not row["other"], str(row)
        assert row["injected"] >= 3
        assert (row["refused"] == 0) == (row["fault"] in llama_faults.HARMLESS), str(row)


def test_a_gguf_file_that_changes_under_its_server_is_refused_until_it_is_as_it_was():
    for row in llama_faults.changes(2):
        harmless = row["file"] in llama_faults.HARMLESS
        assert row["right" if harmless else "refused"] == 2, str(row)


def test_a_killed_server_leaves_its_file_and_what_it_kept_whole():
    (row,) = llama_faults.kills(2)
    assert row["right"] == 2, str(row)
    assert row["kept"] > 0
