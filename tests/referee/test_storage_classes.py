"""Classes of storage: a drive stands for those that are no faster than it is."""

from __future__ import annotations

import pytest

from flashmoe.errors import FlashMoEError
from harness.runs.storage_classes import CLASSES, check_known, within


def test_each_class_is_what_its_standard_says():
    """Lanes, transfers a second and the share of bits that are the user's, worked by hand."""
    worked = {
        "emmc": 8 * 200e6 * 2 / 8,
        "sata": 6e9 * 0.8 / 8,
        "ufs": 2 * 11.66e9 * 0.8 / 8,
        "pcie3": 4 * 8e9 * 128 / 130 / 8,
        "pcie4": 4 * 16e9 * 128 / 130 / 8,
        "pcie5": 4 * 32e9 * 128 / 130 / 8,
    }
    assert {name: one.bytes_per_second for name, one in CLASSES.items()} == pytest.approx(
        worked, rel=1e-3
    )


def test_a_class_that_is_faster_than_the_drive_is_told_of_and_left_out():
    said = []
    assert within(["pcie3", "sata", "emmc"], 2e9, said.append) == {
        "sata": 600_000_000, "emmc": 400_000_000,
    }  # fmt: skip
    assert len(said) == 1 and said[0].startswith("pcie3 is left out: it carries 3.7 GiB a second")
    with pytest.raises(FlashMoEError, match="slower than pcie4 and pcie5: name a slower class"):
        within(["pcie4", "pcie5"], 2e9, said.append)
    with pytest.raises(FlashMoEError, match="storage 'tape' is not known: choose from emmc"):
        check_known(["ufs", "tape"])
