"""A conversation's next turn computes only what is new, and gives the same tokens."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from flashmoe.engines.transformers.serving import cache_memory, stop_texts
from flashmoe.engines.transformers.serving.kept_prefixes import KeptPrefixes

NEW = 6
FAMILIES = {
    "olmoe": {},
    "deepseek_v2": {},
    "gpt_oss": dict(sliding_window=8),
    "qwen3_next": dict(
        num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=16,
        shared_expert_intermediate_size=24, linear_num_value_heads=2, linear_num_key_heads=2,
        linear_key_head_dim=16, linear_value_head_dim=16,
        layer_types=["linear_attention", "linear_attention", "full_attention"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory):
    tiny.FAMILIES.setdefault(request.param, {})
    try:
        folder = tmp_path_factory.mktemp(request.param)
        tiny.make_checkpoint(request.param, folder, **FAMILIES[request.param])
    finally:
        if not tiny.FAMILIES[request.param]:
            del tiny.FAMILIES[request.param]
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def prefixes(model):
    return kept(model, 1 << 20)


def kept(model, budget_bytes):
    memory = cache_memory.measure(model)
    return KeptPrefixes(lambda: cache_memory.new_cache(model), memory, budget_bytes)


def tokens(seed: int, count: int) -> list[int]:
    return torch.randint(3, 128, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def answer(model, prompt: list[int], **cache) -> list[int]:
    """What the model goes on with, greedily."""
    ids = torch.tensor([prompt])
    given = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, **cache
    )
    return given[0, len(prompt) :].tolist()


def turn(model, prefixes: KeptPrefixes, prompt: list[int]) -> tuple[list[int], int]:
    """The answer with kept prefixes, and the tokens that were not computed; it is kept itself."""
    taken = prefixes.take(prompt, len(prompt) + NEW)
    cached = len(taken.token_ids)
    new = answer(model, prompt, cache=taken.cache)
    prefixes.keep(taken, prompt + new)
    return new, cached


def test_every_turn_gives_the_tokens_that_a_model_without_kept_prefixes_gives(model, prefixes):
    prompt = tokens(1, 20)
    known = 0
    for number in range(3):
        new, cached = turn(model, prefixes, prompt)
        assert new == answer(model, prompt)
        assert cached == known
        known = len(prompt) + NEW - 1  # the last token was not computed yet
        prompt = prompt + new + tokens(number, 9)


def test_an_answer_may_be_asked_for_again(model, prefixes):
    prompt = tokens(2, 30)
    first, _ = turn(model, prefixes, prompt)
    again, cached = turn(model, prefixes, prompt)
    assert again == first
    assert cached == (0 if "linear_attention" in layer_types(model) else len(prompt) - 1)


def test_conversations_share_a_beginning_and_keep_their_own_ends(model, prefixes):
    beginning = tokens(3, 20)
    prompts = [beginning + tokens(seed, 40) for seed in (4, 5)]
    for prompt in prompts:
        new, cached = turn(model, prefixes, prompt)
        assert new == answer(model, prompt)
    assert cached == (0 if "linear_attention" in layer_types(model) else len(beginning))
    for prompt in prompts:
        longer = prompt + answer(model, prompt) + tokens(6, 5)
        new, cached = turn(model, prefixes, longer)
        assert new == answer(model, longer)
        assert cached == len(prompt) + NEW - 1


def layer_types(model) -> list[str]:
    return getattr(model.config, "layer_types", None) or []


def test_all_caches_stay_within_the_budget_and_the_least_recent_one_goes(model):
    memory = cache_memory.measure(model)
    prompts = [tokens(seed, 30) for seed in range(10, 16)]
    prefixes = kept(model, 3 * memory.at(30 + NEW) + memory.token_bytes)
    for prompt in prompts:
        turn(model, prefixes, prompt)
        held = sum(cache_memory.size_bytes(each.cache) for each in prefixes.kept)
        assert held == prefixes.memory_bytes <= prefixes.budget_bytes
    assert [each.token_ids[:30] for each in prefixes.kept] == prompts[-len(prefixes.kept) :]
    assert len(prefixes.kept) in (2, 3)


def test_what_a_cache_takes_is_what_was_foreseen(model, prefixes):
    turn(model, prefixes, tokens(1, 50))
    assert prefixes.memory_bytes == pytest.approx(cache_memory.measure(model).at(55), rel=0.02)


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_a_stop_text_is_seen_however_a_text_is_cut_into_pieces(text, stops):
    sent, waiting = "", ""
    for letter in text:
        waiting += letter
        if len(stop_texts.cut(waiting, stops)) < len(waiting):
            waiting = stop_texts.cut(waiting, stops)
            break
        size = stop_texts.begun(waiting, stops)
        sent, waiting = sent + waiting[: len(waiting) - size], waiting[len(waiting) - size :]
    assert (sent + waiting).startswith(stop_texts.cut(text, stops)[: len(sent)])
    assert not any(stop in sent + waiting for stop in stops)
