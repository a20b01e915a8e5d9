"""Prompts of thousands of tokens: the same bits and counts, and memory that does not grow so."""

from __future__ import annotations

import pytest
import torch
from tiny import eager, prompt, run

from flashmoe.cache import simulate
from flashmoe.cache.serving import LONG_CHOICES
from flashmoe.engines.transformers.experts import mixture
from flashmoe.engines.transformers.recorder import record
from harness.tables import long_prompts

FAMILY, TOP_K = "qwen3_moe", 3  # of 8 experts
TOKENS = LONG_CHOICES // TOP_K + 1


@pytest.fixture
def most_kept(monkeypatch):
    """How many experts' outputs waited for their turn at most, of prompts."""
    kept = [0]

    class Watched(mixture.OrderedSum):
        def add(self, expert, tokens, output):
            super().add(expert, tokens, output)
            if len(self.value) > 1:
                kept[0] = max(kept[0], len(self.early))

    monkeypatch.setattr(mixture, "OrderedSum", Watched)
    return kept


@pytest.mark.parametrize("slots", [3, 5, 8])
def test_a_long_prompt_keeps_at_most_one_output_and_no_bit_differs(
    checkpoints, loaded, most_kept, slots
):
    """Cold, then warm from another prompt; what fits the slots, and what comes in waves."""
    model, plain = loaded(FAMILY, slots), eager(checkpoints(FAMILY))
    for ids in (prompt(TOKENS), prompt(TOKENS + 9)):
        tokens, logits = run(plain, ids, 3)
        own_tokens, own_logits = run(model, ids, 3)
        assert torch.equal(own_tokens, tokens)
        assert torch.equal(own_logits, logits)
    assert most_kept[0] <= 1
    assert model.flashmoe.stats()["hits"] > 0


def test_a_shorter_prompt_computes_what_is_resident_first(loaded, most_kept):
    model = loaded(FAMILY, 5)
    run(model, prompt(LONG_CHOICES // TOP_K), 3)
    assert most_kept[0] > 1


def test_a_long_prompt_reads_each_expert_once(loaded):
    model = loaded(FAMILY, 3)
    with torch.inference_mode():
        model(prompt(TOKENS))
    stats, contents = model.flashmoe.stats(), model.flashmoe.manifest
    assert stats["misses"] == stats["requests"] == sum(x.n_experts for x in contents.layers)
    assert stats["bytes_read"] == stats["misses"] * contents.layers[0].extent_bytes


@pytest.mark.parametrize("policy", ["lru", "learned", "lecar"])
def test_a_recorded_long_prompt_replayed_gives_the_engines_hits(loaded, policy):
    model = loaded(FAMILY, 5, policy)
    trace = record(model, [prompt(n)[0] for n in (TOKENS, 30, TOKENS)], max_new_tokens=20)
    stats = model.flashmoe.stats()
    conditions = simulate.Conditions(warm=True, as_recorded=True)
    outcome = simulate.replay(trace, policy, 1.0, conditions, slots=stats["slots_per_layer"])
    assert (outcome.requests, outcome.hits) == (stats["requests"], stats["hits"])


def test_the_table_of_peaks_is_made_of_what_the_kernel_counts(monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed is given back at once
    rows = long_prompts.table(
        dict(hidden_size=64, intermediate_size=32, num_experts=8, num_experts_per_tok=2,
             num_attention_heads=2),
        (3000,),
    )  # fmt: skip
    assert [row["system"] for row in rows] == ["flashmoe", "transformers"]
    for row in rows:
        assert row["hidden_bytes"] == 3000 * 64 * 2
        assert row["peak_beside_bytes"] >= row["experts_beside_bytes"] >= row["hidden_bytes"]
        assert 3000 / 8 < row["busiest_expert_tokens"] <= 3000
    assert rows[0]["busiest_expert_tokens"] == rows[1]["busiest_expert_tokens"]
