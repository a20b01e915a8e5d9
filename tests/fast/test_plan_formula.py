"""A plan's formula and choices, by numbers that were worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flashmoe.engines.model_facts import ModelFacts
from flashmoe.memory import free_memory
from flashmoe.plan import choice, formula, measured, planner
from flashmoe.plan.formula import Speeds
from flashmoe.plan.machine import Machine, drive_speed, memory_speed
from flashmoe.plan.measured import Curve
from flashmoe.plan.planner import Request

GB = 10**9
# 2 layers of 4 experts of 100 bytes; a token uses 2 of each, 400 bytes, and 100 beside them
FACTS = ModelFacts(
    engine="llama", architecture="x", weights="q4_k", layers=2, n_experts=4, top_k=2,
    experts_bytes=800, dense_bytes=150, dense_token_bytes=100, beside_bytes=0, parameters=1900,
    kv_bytes=10, window_kv_bytes=4, window_tokens=50, least_bytes=400, reserve_bytes=64,
)  # fmt: skip
SPEEDS = Speeds(
    arithmetic=1000, layer_seconds=0.05, drive=200, serial_share=0.5, prompt_gain=2
)  # fmt: skip
# 48 layers of 128 experts, as Qwen3-30B-A3B in Q4_K_M has them
LARGE = replace(
    FACTS, layers=48, n_experts=128, top_k=8, experts_bytes=17 * GB, dense_bytes=GB,
    dense_token_bytes=GB, parameters=30 * GB, least_bytes=GB // 2, kv_bytes=100_000,
    window_kv_bytes=0, reserve_bytes=free_memory.RESERVE_BYTES,
)  # fmt: skip
MACHINE = Machine(20 * GB, 2, 20 * GB, 2 * GB, "a drive")
REQUEST = Request(context_tokens=4096, prompt_tokens=500)


def test_a_token_takes_the_longer_of_reading_and_computing_and_part_of_the_shorter():
    assert formula.arithmetic_seconds(FACTS, SPEEDS) == pytest.approx(0.1 + 0.5)
    # half of 400 bytes is read at 200 bytes a second
    assert formula.token_seconds(FACTS, 0.5, SPEEDS) == pytest.approx(1.0 + 0.5 * 0.6)
    # a tenth is, and computing is the longer one
    assert formula.token_seconds(FACTS, 0.9, SPEEDS) == pytest.approx(0.6 + 0.5 * 0.2)
    assert formula.token_seconds(FACTS, 1.0, SPEEDS) == pytest.approx(0.6)


def test_a_prompt_reads_the_experts_that_it_needs_once():
    # one token needs half of the 800 bytes, two need three quarters
    assert formula.first_token_seconds(FACTS, 1, SPEEDS) == pytest.approx(2 + 0.5 * 0.3)
    assert formula.first_token_seconds(FACTS, 2, SPEEDS) == pytest.approx(3 + 0.5 * 0.6)


def test_a_cache_grows_with_the_context_and_its_windows_end():
    assert FACTS.cache_bytes(20) == 20 * 14
    assert FACTS.cache_bytes(1000) == 1000 * 10 + 50 * 4


def test_hit_rates_lie_on_straight_lines_from_nothing_to_all():
    curve = Curve("x", True, (2, 4, 2), (0.25, 0.5), (0.4, 0.8))
    shares = (0, 0.125, 0.25, 0.375, 0.75, 1, 2)
    assert [curve.at(share) for share in shares] == pytest.approx([0, 0.2, 0.4, 0.6, 0.9, 1, 1])


def test_a_model_of_a_known_geometry_has_its_own_routing_others_a_range_of_real_ones():
    figures = measured.load()
    gpt_oss = replace(FACTS, layers=24, n_experts=32, top_k=4)
    assert [c.trace for c in measured.curves_for(figures, gpt_oss)] == ["gpt-oss-20b-mmlu"]
    others = measured.curves_for(figures, LARGE)
    assert len(others) > 1
    assert all(curve.real for curve in others)


def test_the_speed_of_a_core_is_of_the_most_similar_weights_that_were_measured():
    figures = replace(
        measured.load(),
        core_bytes_per_second={"llama": 1.0, "llama exact": 2.0, "llama exact q4_k": 3.0},
    )
    assert measured.core_speed(figures, FACTS, "exact") == 3
    assert measured.core_speed(figures, replace(FACTS, weights="iq1_s"), "exact") == 2
    assert measured.core_speed(figures, FACTS, "fast") == 1


def test_more_memory_is_never_slower_and_ranges_hold_what_is_expected():
    rows = planner.outlooks(LARGE, MACHINE, REQUEST, measured.load())
    assert [row.budget for row in rows] == ["15%", "25%", "40%", "60%", "100%", "auto"]
    speeds = [row.tokens_per_second.expected for row in rows[:5]]
    assert speeds == sorted(speeds)
    for row in rows:
        for value in (row.hit_rate, row.tokens_per_second, row.first_token_seconds):
            assert value.low <= value.expected <= value.high


def test_what_does_not_fit_is_not_advised():
    figures = measured.load()
    rows = planner.outlooks(LARGE, replace(MACHINE, available_bytes=8 * GB), REQUEST, figures)
    assert {row.budget: row.fits for row in rows} == {
        "15%": True, "25%": True, "40%": False, "60%": False, "100%": False, "auto": True,
    }  # fmt: skip
    # 8 GB less a tenth, 1 GB of all else and 0.4 of the KV cache
    auto = rows[-1]
    assert auto.memory_bytes == pytest.approx(5.8 * GB, rel=0.01)
    assert planner.advised(rows) is auto
    rows = planner.outlooks(LARGE, replace(MACHINE, available_bytes=GB), REQUEST, figures)
    assert "auto" not in {row.budget for row in rows}
    assert planner.advised(rows) is None


def test_a_slow_drive_makes_every_budget_slower_but_the_one_that_holds_all():
    figures = measured.load()
    fast, slow = (
        planner.outlooks(LARGE, replace(MACHINE, drive_bytes_per_second=speed), REQUEST, figures)
        for speed in (4 * GB, GB // 2)
    )
    for one, other in zip(fast[:4], slow[:4], strict=True):
        assert one.tokens_per_second.expected > other.tokens_per_second.expected
    assert fast[4].tokens_per_second == slow[4].tokens_per_second


def test_of_several_files_the_largest_that_is_nearly_the_fastest_and_has_four_bits():
    sizes = {"Q2.gguf": 10 * GB, "Q4_S.gguf": 17 * GB, "Q4_M.gguf": 18 * GB, "Q8.gguf": 33 * GB}
    found = choice.candidates(sizes, LARGE, MACHINE, REQUEST, measured.load())
    assert [one.file for one in found] == list(sizes)
    best = choice.chosen(found)
    assert best
    assert best.file == "Q4_M.gguf"
    tiny = replace(MACHINE, available_bytes=GB)
    assert choice.chosen(choice.candidates(sizes, LARGE, tiny, REQUEST, measured.load())) is None


def test_a_machine_is_measured(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * (3 << 20))
    assert drive_speed(path, 1 << 20, seconds=0.2) > 0
    assert drive_speed(path, 100, seconds=0.2) > 0
    assert memory_speed(1, seconds=0.05) > 0
