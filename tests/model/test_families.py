"""Every MoE family that the installed transformers has: streamed, it says what eager says."""

from __future__ import annotations

import pytest

from harness import tiny_models
from harness.tables import families


@pytest.mark.parametrize("family", tiny_models.families())
def test_a_family_is_streamed_with_its_own_output_in_every_dtype_or_explained(family):
    row = families.examine(family)
    for dtype in families.DTYPES:
        explained = families.EXPLAINED.get(family)
        explained = explained or families.EXPLAINED.get(f"{family} in {dtype}", "equal")
        assert row[dtype] == explained
    if family not in families.EXPLAINED:
        assert row["moe_layers"] > 0
        assert row["misses"] > 0


def test_the_document_lists_what_there_is():
    listed = families.DOCUMENT.read_text()
    for family in tiny_models.families():
        assert f"| {family} | {tiny_models.architecture(family).__name__} |" in listed
