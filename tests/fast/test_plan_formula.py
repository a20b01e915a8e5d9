"""A plan's formula and choices, by numbers that were worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flashmoe.engines.model_facts import ModelFacts
from flashmoe.errors import FlashMoEError
from flashmoe.memory import free_memory
from flashmoe.plan import choice, formula, measured, planner
from flashmoe.plan.formula import Speeds
from flashmoe.plan.machine import Machine, drive_speed, has_avx512, memory_speed, new_memory_speed
from flashmoe.plan.measured import Curve
from flashmoe.plan.planner import Request

GB = 10**9
# 2 layers of 4 experts of 100 bytes; a token uses 2 of each, 400 bytes, and 100 beside them
FACTS = ModelFacts(
    engine="llama", architecture="x", weights="q4_k", layers=2, n_experts=4, top_k=2,
    experts_bytes=800, dense_bytes=150, dense_token_bytes=100, beside_bytes=0, parameters=1900,
    expert_parameters=1600, kv_bytes=10, window_kv_bytes=4, window_tokens=50, least_bytes=400,
    reserve_bytes=64,
)  # fmt: skip
SPEEDS = Speeds(
    memory=1000, expert_weights=8000, dense_weights=2000, layer_seconds=0.05, drive=200,
    serial_share=0.5, waits_for_reads=True, prompt_expert_weights=16000,
    prompt_dense_weights=4000, new_memory=400,
)  # fmt: skip
# 48 layers of 128 experts, as Qwen3-30B-A3B in Q4_K_M has them
LARGE = replace(
    FACTS, layers=48, n_experts=128, top_k=8, experts_bytes=17 * GB, dense_bytes=GB,
    dense_token_bytes=GB, parameters=30 * GB, expert_parameters=29 * GB,
    least_bytes=GB // 2, kv_bytes=100_000, window_kv_bytes=0,
    reserve_bytes=free_memory.RESERVE_BYTES,
)  # fmt: skip
MACHINE = Machine(20 * GB, 2, True, 20 * GB, GB, 2 * GB, "a drive")
REQUEST = Request(context_tokens=4096, prompt_tokens=500)


def test_a_token_takes_the_longer_of_reading_and_computing_and_part_of_the_shorter():
    # 500 bytes come from memory; 800 weights of experts and 200 others are multiplied by
    assert formula.arithmetic_seconds(FACTS, SPEEDS) == pytest.approx(0.1 + 0.5 + 0.1 + 0.1)
    # half of 400 bytes is read at 200 bytes a second
    assert formula.token_seconds(FACTS, 0.5, 0.5, SPEEDS) == pytest.approx(1.0 + 0.5 * 0.8)
    # a tenth is, and computing is the longer one
    assert formula.token_seconds(FACTS, 0.5, 0.9, SPEEDS) == pytest.approx(0.8 + 0.5 * 0.2)
    assert formula.token_seconds(FACTS, 1.0, 1.0, SPEEDS) == pytest.approx(0.8)


def test_nothing_is_read_ahead_where_a_token_needs_all_slots_of_a_layer():
    """Of 4 experts a token uses 2, and there is memory for one and a half."""
    assert formula.token_seconds(FACTS, 0.375, 0.5, SPEEDS) == pytest.approx(1.0 + 0.8)
    streamed = replace(SPEEDS, waits_for_reads=False)
    assert formula.token_seconds(FACTS, 0.375, 0.5, streamed) == pytest.approx(1.0 + 0.5 * 0.8)


def test_a_prompt_reads_the_experts_that_it_needs_once_into_new_memory():
    # 10 tokens take 0.5 s for experts and as much for all else; half of 800 bytes are read in 2 s
    # and what there is memory for is written for the first time
    assert formula.first_token_seconds(FACTS, 0.25, 0.5, 10, SPEEDS) == pytest.approx(0.5 + 2.5)
    assert formula.first_token_seconds(FACTS, 1.0, 0.5, 10, SPEEDS) == pytest.approx(1.0 + 2.5)


def test_a_cache_grows_with_the_context_and_its_windows_end():
    assert FACTS.cache_bytes(20) == 20 * 14
    assert FACTS.cache_bytes(1000) == 1000 * 10 + 50 * 4


def test_hit_rates_lie_on_straight_lines_from_nothing_to_all():
    curve = Curve("x", True, (2, 4, 2), (0.25, 0.5), (0.4, 0.8), (1, 4, 16), (0.5, 0.7, 0.8))
    shares = (0, 0.125, 0.25, 0.375, 0.75, 1, 2)
    assert [curve.at(share) for share in shares] == pytest.approx([0, 0.2, 0.4, 0.6, 0.9, 1, 1])
    # twice as many tokens, as often as it takes
    assert [curve.needed(n) for n in (1, 2, 8, 16, 99)] == pytest.approx([0.5, 0.6, 0.75, 0.8, 0.8])


def test_a_model_of_a_known_geometry_has_its_own_routing_others_a_range_of_real_ones():
    figures = measured.load()
    gpt_oss = replace(FACTS, layers=24, n_experts=32, top_k=4)
    assert [c.trace for c in measured.curves_for(figures, gpt_oss)] == ["gpt-oss-20b-mmlu"]
    others = measured.curves_for(figures, LARGE)
    assert len(others) > 1
    assert all(curve.real for curve in others)


def test_a_way_that_was_not_measured_costs_what_the_most_similar_one_does():
    figures = {"llama packed": 1.0, "transformers plain": 2.0}
    assert measured.seconds_per_weight(figures, "transformers plain") == 2
    assert measured.seconds_per_weight(figures, "transformers packed") == 1
    assert measured.seconds_per_weight(figures, "transformers dequantised") == 2
    assert measured.seconds_per_weight(figures, "llama plain") == 2


@pytest.mark.parametrize(
    ("engine", "weights", "arithmetic", "way"),
    [
        ("llama", "q4_k", "exact", "llama packed"),
        ("llama", "bf16", "exact", "llama plain"),
        ("transformers", "bfloat16", "exact", "transformers plain"),
        ("transformers", "bfloat16", "fast", "transformers fast"),
        ("transformers", "mxfp4", "exact", "transformers dequantised"),
        ("transformers", "mxfp4", "fast", "transformers packed"),
        ("transformers", "int4", "exact", "transformers packed"),
    ],
)
def test_how_experts_are_multiplied_by(engine, weights, arithmetic, way):
    facts = replace(FACTS, engine=engine, weights=weights)
    assert measured.expert_way(facts, arithmetic) == way


def test_a_machine_without_avx_512_is_slower():
    figures = measured.load()
    fast, slow = (
        planner.outlooks(LARGE, replace(MACHINE, avx512=has), REQUEST, figures)[0]
        for has in (True, False)
    )
    assert fast.tokens_per_second.expected > slow.tokens_per_second.expected
    assert fast.first_token_seconds.expected < slow.first_token_seconds.expected


def test_vectors_are_as_the_system_lists_them(tmp_path):
    listed = tmp_path / "cpuinfo"
    listed.write_text("processor : 0\nflags\t\t: fpu avx2 avx512f\n\nprocessor : 1\n")
    assert has_avx512(listed)
    listed.write_text("flags : fpu avx2 avx512fp16\n")
    assert not has_avx512(listed)
    assert not has_avx512(tmp_path / "none")


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


def test_a_budget_that_is_asked_for_is_what_is_advised_if_it_fits():
    figures = measured.load()
    for asked in (3 * GB, 15 * GB, 19 * GB):
        machine = replace(MACHINE, available_bytes=30 * GB)
        rows = planner.outlooks(LARGE, machine, replace(REQUEST, memory_bytes=asked), figures)
        assert rows[-1].budget == planner.ASKED
        assert rows[-1].memory_bytes == min(asked, LARGE.experts_bytes)
        assert planner.advised(rows) is rows[-1]
    small = replace(MACHINE, available_bytes=4 * GB)
    rows = planner.outlooks(LARGE, small, replace(REQUEST, memory_bytes=3 * GB), figures)
    assert planner.advised(rows) is None
    with pytest.raises(FlashMoEError, match="477MiB at least"):
        planner.outlooks(LARGE, MACHINE, replace(REQUEST, memory_bytes=GB // 4), figures)


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
    assert new_memory_speed() > 0
