"""Sizes as people write them, and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe.errors import FlashMoEError
from flashmoe.util.sizes import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        (1048576, 1 << 20), ("1048576", 1 << 20), ("4GiB", 4 << 30), ("4G", 4 << 30),
        ("4gb", 4 * 10**9), (" 512 MB ", 512 * 10**6), ("1.5KiB", 1536), ("7B", 7),
    ],
)  # fmt: skip
def test_a_size_is_read_in_binary_and_in_decimal_units(text, size_bytes):
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize("text", ["", "many", "-1", "1e9", "nan", "4XB", "1.2.3GiB", "9" * 400])
def test_what_is_no_size_is_refused_in_a_sentence(text):
    with pytest.raises(FlashMoEError, match="is not a size: write for example 4GiB"):
        parse_bytes(text)


@pytest.mark.parametrize("size", [0, -1, "0", "0.1B"])
def test_a_size_of_no_bytes_is_refused_in_a_sentence(size):
    with pytest.raises(FlashMoEError, match="must be more than zero bytes"):
        parse_bytes(size)


@given(st.integers(1, 1 << 42))
def test_a_size_that_is_shown_reads_as_nearly_the_same(size_bytes):
    assert parse_bytes(format_bytes(size_bytes)) == pytest.approx(size_bytes, rel=0.06, abs=1)
