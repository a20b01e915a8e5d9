"""The table of warm starts has a rate for each start, and says what was restored."""

from __future__ import annotations

import flashmoe
from flashmoe.engines.transformers.checkpoints.pack import pack
from harness.tables import warm_table


def test_each_start_has_its_hit_rates(tmp_path, monkeypatch):
    kind, prompt = next(iter(warm_table.FIRST_PROMPTS.items()))
    monkeypatch.setattr(warm_table, "FIRST_PROMPTS", {kind: prompt})
    monkeypatch.setattr(warm_table, "TOKENS", 8)
    pack(flashmoe.demo_path(), tmp_path / "store")
    (row,) = warm_table.table(tmp_path / "store")
    assert row["kind"] == kind
    assert row["restored"] > 0
    rates = [row[f"first_{name}_{start}"] for name in ("token", 8) for start in ("cold", "warm")]
    assert all(0 < rate <= 1 for rate in rates)
