"""Seconds of what `nox -s soak` does for an hour."""

from __future__ import annotations

from harness.torture import llama_soak
from harness.torture.soak import soak


def test_nothing_grows():
    rows = soak(15, lambda text: None)
    assert rows[-1]["rounds"] > 1
    assert rows[-1]["tokens"] > 0


def test_nothing_grows_in_llama_cpps_server():
    rows = llama_soak.soak(8, lambda text: None)
    assert rows[-1]["rounds"] > 1
    assert rows[-1]["tokens"] > 0
