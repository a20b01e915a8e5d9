"""Each baseline's mechanism at work, and that its output is what it claims to be."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tiny import FAMILIES, budget, generate, make_checkpoint, prompt

import baselines
from baselines import popularity
from baselines.base import Setting
from baselines.daop import SWAP_RATIO, TRUE_ROUTER_LAYERS
from baselines.latencies import Latencies
from baselines.tiers import MappedTier, PinnedTier
from flashmoe.engines.transformers.checkpoints.pack import pack
from flashmoe.engines.transformers.recorder import record
from flashmoe.errors import FlashMoEError
from flashmoe.store import manifest
from flashmoe.trace import Trace

EXACT = [name for name, system in baselines.available().items() if system.exact]


def setting(checkpoint, store, slots: int = 4) -> Setting:
    """So many experts a layer, two more, and a profile in which low numbers are popular.

    Of what is pinned, a half of that, one is for copies.
    """
    contents = manifest.load(store)
    layers, experts = contents.layers, contents.layers[0].n_experts
    rng = np.random.default_rng(0)
    weights = np.arange(experts, 0, -1) / np.arange(experts + 1).sum()
    rows = [
        [rng.choice(experts, contents.top_k, replace=False, p=weights) for _ in layers]
        for _ in range(200)
    ]
    profile = Trace(np.array(rows, np.uint8), np.zeros(200, np.int32), experts)
    return Setting(checkpoint, store, budget(store, slots, spares=2), profile)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("family", FAMILIES)
def test_systems_that_claim_the_models_own_output_give_it(checkpoints, stores, family, name):
    given = setting(checkpoints(family), stores(family))
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        given.checkpoint, experts_implementation="eager"
    )
    system = baselines.get(name)()
    model = system.load(given)
    for ids in (prompt(12), prompt(1)):
        assert generate(model, ids, 8) == generate(plain, ids, 8)
    system.close()


@pytest.fixture
def deep(tmp_path):
    """A checkpoint with layers beyond those that use DAOP's true router, and its store."""
    make_checkpoint("olmoe", tmp_path / "checkpoint", num_hidden_layers=8)
    pack(tmp_path / "checkpoint", tmp_path / "store")
    return setting(tmp_path / "checkpoint", tmp_path / "store")


def test_fiddlers_choice_flips_where_the_latencies_cross():
    # a token on the CPU takes 7, a copy 70, a token in A nothing: the original's constants
    original = Latencies(cpu=(7.0, 0.0), pinned=(0.0, 0.0), copy=70.0)
    assert [original.copies(n) for n in (1, 10, 11, 100)] == [False, False, True, True]
    alike = Latencies(cpu=(7.0, 1.0), pinned=(7.0, 1.0), copy=70.0)  # no GPU: never worth a copy
    assert not any(alike.copies(n) for n in (1, 11, 10_000))


def test_fiddler_copies_when_it_pays_and_output_stays(deep):
    system = baselines.get("fiddler")()
    model = system.load(deep)
    assert min(*system.latencies.cpu, *system.latencies.pinned) > -1e-3
    assert system.latencies.copy > 0
    # what it measured of experts of kilobytes is noise: A and CPU alike, as without a GPU
    system.latencies = Latencies(cpu=(1.0, 0.0), pinned=(1.0, 0.0), copy=0.5)
    plain = generate(model, prompt(12), 8)
    assert system.copied == 0
    assert 0 < system.hits < system.requests
    system.latencies = Latencies(cpu=(1.0, 0.0), pinned=(0.0, 0.0), copy=0.5)
    assert generate(model, prompt(12), 8) == plain
    assert system.copied > 0
    system.close()


@pytest.mark.parametrize(("share", "pinned"), [("0.25", 7), ("0.5", 16), ("0.9", 29)])
def test_a_name_says_how_much_is_pinned(deep, share, pinned):
    system = baselines.get(f"fiddler:{share}")()
    system.load(deep)
    assert sum(map(len, system.pinned.slot_of)) == pinned  # of 34 extents, one of them for copies
    assert system.residency.startswith(f"{float(share):.0%} of the budget: globally popular")
    system.close()


def test_pins_at_random_change_the_hits_and_not_the_output(deep):
    hits, outputs = [], []
    for label in ("fiddler", "fiddler:0.5", "fiddler:0.5,random"):
        system = baselines.get(label)()
        outputs.append(generate(system.load(deep), prompt(12), 8))
        hits.append([set(experts) for experts in system.pinned.slot_of])
        system.close()
    assert outputs[0] == outputs[1] == outputs[2]
    assert hits[0] == hits[1] != hits[2]
    unprofiled = baselines.get("fiddler:0.5,random")()
    unprofiled.load(replace(deep, profile=None))  # chance needs none
    assert [set(experts) for experts in unprofiled.pinned.slot_of] == hits[2]
    unprofiled.close()


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("fiddler:", "'' is no share of the budget to pin; write fiddler:0.25"),
        ("fiddler:1.5", "'1.5' is no share"),
        ("fiddler:nan", "'nan' is no share"),
        ("daop:0.5,popular", "write daop:0.25 or daop:0.25,random"),
        ("os-paging:0.5", "system 'os-paging' takes no argument"),
        ("flashmoe:nothing", "no policy is called 'nothing'"),
        ("flashmoe-lru:fifo", "takes no argument"),
        ("nothing:0.5", "no system is called 'nothing'"),
    ],
)
def test_names_that_make_no_sense_are_refused(label, words):
    with pytest.raises(FlashMoEError, match=words):
        baselines.get(label)


def test_the_engine_is_a_system_under_any_policy():
    assert baselines.get("flashmoe:flashmoe-paper:scorer")().policy == "flashmoe-paper:scorer"
    assert baselines.get("flashmoe")().policy == "learned"


def test_popularity_beats_chance_a_little(deep):
    """The direction of the paper's 53.0 against 48.8 %: by popularity A holds more of the uses."""
    uses = popularity.counts(deep.profile, manifest.load(deep.store))
    chosen = popularity.most_popular(uses, uses.size // 2)
    held = sum(uses[layer, experts].sum() for layer, experts in enumerate(chosen))
    assert sum(map(len, chosen)) == uses.size // 2
    assert held > uses.sum() / 2
    with pytest.raises(FlashMoEError, match="give it a trace"):
        popularity.counts(None, manifest.load(deep.store))
    with pytest.raises(FlashMoEError, match="3 layers x 8 experts, the model 8 x 8"):
        few = Trace(deep.profile.experts[:, :3], deep.profile.sequence, 8)
        popularity.counts(few, manifest.load(deep.store))


@given(
    uses=arrays(np.int64, (4, 6), elements=st.integers(0, 50)),
    n=st.integers(0, 24),
)
def test_what_an_equal_quota_leaves_over_goes_to_the_most_popular(uses, n):
    chosen = popularity.most_popular_by_layer(uses, n)
    assert sum(map(len, chosen)) == n
    assert all(len(set(experts)) == len(experts) >= n // 4 for experts in chosen)
    for layer, experts in enumerate(chosen):
        by_quota, more = experts[: n // 4], experts[n // 4 :]
        rest = np.delete(uses[layer], by_quota)
        assert all(uses[layer, e] >= rest.max() for e in by_quota if len(rest))
        for expert in more:  # nothing that was left behind is more popular
            left = [np.delete(row, own) for row, own in zip(uses, chosen, strict=True)]
            assert all((row <= uses[layer, expert]).all() for row in left)


def test_daop_is_calibrated_by_decoding_alone(deep):
    contents = manifest.load(deep.store)
    step = np.r_[np.zeros(150), np.arange(1, 51)].astype(np.int32)  # a prompt of 150, 50 tokens
    recorded = replace(deep.profile, step=step)
    decoded = popularity.counts(recorded, contents, decoded_only=True)
    assert decoded.sum() == 50 * 8 * 2
    alone = Trace(deep.profile.experts[150:], deep.profile.sequence[150:], 8)
    assert (decoded == alone.uses()).all()
    assert popularity.counts(recorded, contents).sum() == 200 * 8 * 2
    untold = popularity.counts(deep.profile, contents, decoded_only=True)  # all came alone
    assert (untold == deep.profile.uses()).all()
    with pytest.raises(FlashMoEError, match="decoded tokens, of which the trace has none"):
        popularity.counts(replace(recorded, step=np.zeros(200, np.int32)), contents, True)


def test_daop_copies_for_a_prompt_where_it_pays(deep):
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        deep.checkpoint, experts_implementation="eager"
    )
    system = baselines.get("daop")()
    model = system.load(deep)
    system.plan_ahead = lambda layer, hidden: None
    system.latencies = Latencies(cpu=(1.0, 0.0), pinned=(1.0, 0.0), copy=0.5)
    expected = generate(plain, prompt(12), 8)
    assert generate(model, prompt(12), 8) == expected
    assert system.copied == 0
    system.latencies = Latencies(cpu=(1.0, 0.0), pinned=(0.0, 0.0), copy=2.5)  # from 3 tokens on
    other = prompt(13)
    assert generate(model, other, 1) == generate(plain, other, 1)
    copied = system.copied
    assert copied > 0
    system.latencies = Latencies(cpu=(1.0, 0.0), pinned=(0.0, 0.0), copy=0.0)
    generate(model, prompt(1), 8)  # decode alone: nothing is copied, whatever it costs
    assert system.copied == copied
    system.close()


def test_daop_swaps_follow_the_sequence(deep):
    system = baselines.get("daop")()
    system.load(deep)
    before = [set(held) for held in system.pinned.slot_of]
    assert all(len(held) == 2 for held in before)  # half of four slots a layer
    hot = next(e for e in range(8) if e not in before[3])
    cold, warm = sorted(before[3])
    index = torch.tensor([[hot, warm]] * 20 + [[warm, cold]])
    system.swap(3, index)
    assert set(system.pinned.slot_of[3]) == {hot, warm}
    assert system.swaps == 1
    contents = manifest.load(deep.store)
    swapped = MappedTier(deep.store, contents).parameters(3, hot)
    for name, tensor in system.pinned.parameters(3, hot).items():
        assert torch.equal(tensor, swapped[name])
    other = next(e for e in range(8) if e not in (hot, warm))
    system.swap(3, torch.tensor([[other, hot]] * 20 + [[hot, warm]] * 20))  # 20 and 20: not 1.05
    assert SWAP_RATIO > 1
    assert set(system.pinned.slot_of[3]) == {hot, warm}
    system.close()


def test_daop_predicts_beyond_its_first_layers_and_says_how_well(deep):
    system = baselines.get("daop")()
    model = system.load(deep)
    ids = prompt(12)
    generate(model, ids, 8)
    assert system.stats()["swaps"] > 0
    assert 0 < system.predicted_right <= system.predicted
    steps = 7  # decoded with a forward pass; each predicts at the layers from 5 on
    assert system.predicted == steps * (8 - TRUE_ROUTER_LAYERS) * 2
    system.close()


def test_daop_without_predictions_would_be_exact(deep):
    """What changes its output is prediction alone, not placement or concurrency."""
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        deep.checkpoint, experts_implementation="eager"
    )
    system = baselines.get("daop")()
    model = system.load(deep)
    system.plan_ahead = lambda layer, hidden: None
    assert generate(model, prompt(12), 8) == generate(plain, prompt(12), 8)
    system.close()


def test_daop_degrades_gracefully(deep):
    from flashmoe.engines.transformers.experts.lookahead import RouterOutput

    system = baselines.get("daop")()
    system.load(deep)
    held = sorted(system.pinned.slot_of[6])
    outside = [e for e in range(8) if e not in held][:2]
    scores = torch.zeros(1, 8)
    scores[0, held[1]] = 1.0
    guess = RouterOutput(scores, torch.tensor([[0.6, 0.2]]), torch.tensor([outside]))
    plan = system.degrade(6, guess)
    assert plan.index[0].tolist() == [
        outside[0],
        held[1],
    ]  # the weakest gave way to the best pinned
    assert plan.weights.sum().item() == pytest.approx(0.8)
    kept = RouterOutput(scores, guess.weights, torch.tensor([[outside[0], held[0]]]))
    assert system.degrade(6, kept).index[0].tolist() == [outside[0], held[0]]
    assert system.degraded == 1
    system.close()


def test_the_tiers_hold_the_stores_bytes(stores):
    store = stores("mixtral")
    contents = manifest.load(store)
    mapped = MappedTier(store, contents)
    pinned = PinnedTier(store, contents, [[2, 0], [], [1]])
    assert pinned.holds(0, 2) and not pinned.holds(1, 2)
    for layer, expert in ((0, 2), (0, 0), (2, 1)):
        expected = mapped.parameters(layer, expert)
        for name, tensor in pinned.parameters(layer, expert).items():
            assert torch.equal(tensor, expected[name])
    pinned.close()


def test_what_is_recorded_on_a_baseline_is_what_it_ran(checkpoints, stores):
    """Routing hooks see the true router, also of systems that run experts their own way."""
    given = setting(checkpoints(), stores())
    system = baselines.get("os-paging")()
    trace = record(system.load(given), [prompt(12)[0]], max_new_tokens=4)
    assert len(trace.experts) == 12 + 3
    system.close()
