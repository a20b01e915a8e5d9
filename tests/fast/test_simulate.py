"""The simulator against an independent replay written out longhand, and its options."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import flashmoe
from flashmoe import policies, trace
from flashmoe.cache import simulate
from flashmoe.cache.simulate import Conditions
from flashmoe.errors import FlashMoEError
from flashmoe.trace import Trace

SHARED = Path(__file__).parents[3] / "shared" / "traces"
REAL = [flashmoe.demo_routing_path(), *sorted(SHARED.glob("*.npz"))]


def random_trace(tokens=60, layers=3, n_experts=12, top_k=3, seed=1) -> Trace:
    rng = np.random.default_rng(seed)
    order = [rng.permutation(n_experts)[:top_k] for _ in range(tokens * layers)]
    experts = np.stack(order).reshape(tokens, layers, top_k).astype(np.uint8)
    sequence = np.sort(rng.integers(0, 4, tokens)).astype(np.int32)
    return Trace(experts, sequence, n_experts)


def longhand_lru(recorded: Trace, slots: int, *, warm: bool, shared: bool) -> int:
    """Lists in order of use; ties within an event go by order of admission."""
    hits = 0
    groups = [range(recorded.n_layers)] if shared else [[x] for x in range(recorded.n_layers)]
    for group in groups:
        use: dict[tuple[int, int], int] = {}
        resident: list[tuple[int, int]] = []
        capacity, clock, previous = slots * len(group), 0, None
        for token in range(len(recorded.experts)):
            if recorded.sequence[token] != previous and not warm:
                use, resident = {}, []
            previous = recorded.sequence[token]
            for layer in group:
                wanted = [(layer, int(e)) for e in recorded.experts[token, layer]]
                hits += sum(key in resident for key in wanted)
                for key in wanted:
                    use[key] = clock
                clock += 1
                for key in wanted:
                    if key not in resident:
                        if len(resident) == capacity:
                            others = [r for r in resident if r not in wanted]
                            resident.remove(min(others, key=lambda r: use[r]))
                        resident.append(key)
    return hits


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_lru_equals_a_longhand_replay(warm, shared):
    recorded = random_trace()
    outcome = simulate.replay(recorded, "lru", 0.5, Conditions(warm, shared))
    assert outcome.hits == longhand_lru(recorded, outcome.slots, warm=warm, shared=shared)
    assert outcome.requests == recorded.experts.size


def plain_replay(
    recorded: Trace, slots: int, policy: str, *, sequential: bool, prompt: int, warm: bool
) -> list[tuple[int, int]]:
    """Requests and hits of each sequence, of "lru" or "fifo", by one list a layer."""
    counted = [[0, 0] for _ in recorded.sequences()]
    for layer in range(recorded.n_layers):
        order: list[int] = []  # who goes first comes first
        for number, (_, tokens) in enumerate(recorded.sequences()):
            order = order if warm else []
            for position, token in enumerate(range(tokens.start, tokens.stop)):
                chosen = recorded.experts[token, layer].tolist()
                if position == prompt - 1:  # before the prompt's last token, which misses nothing
                    order = [expert for expert in order if expert in chosen]
                groups = [[expert] for expert in chosen] if sequential else [chosen]
                for group in groups:
                    if position >= prompt:
                        counted[number][0] += len(group)
                        counted[number][1] += sum(expert in order for expert in group)
                    missing = [expert for expert in group if expert not in order]
                    if policy == "lru":  # a stable sort: of one token, the longest resident first
                        order.sort(key=group.__contains__)
                    for expert in missing:
                        if len(order) == slots:
                            order.remove(next(e for e in order if e not in group))
                        order.append(expert)
    return [(requests, hits) for requests, hits in counted]


@pytest.mark.parametrize("policy", ["lru", "fifo"])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize(("sequential", "prompt"), [(True, 0), (False, 5), (True, 5)])
def test_sequential_and_decode_only_equal_a_plain_replay(policy, warm, sequential, prompt):
    recorded = random_trace()
    conditions = Conditions(
        warm, sequential=sequential, decode_only=prompt > 0, prompt_tokens=prompt or None
    )
    outcome = simulate.replay(recorded, policy, 0.4, conditions)
    plain = plain_replay(
        recorded, outcome.slots, policy, sequential=sequential, prompt=prompt, warm=warm
    )
    assert [tuple(row) for row in outcome.per_stream.tolist()] == plain


def test_a_prompt_is_what_the_trace_records_before_single_tokens():
    whole = random_trace(tokens=12)
    step = np.array([0, 0, 0, 1, 1, 2, 3, 4, 4, 5, 6, 7], np.int32)
    recorded = replace(whole, sequence=np.array([0] * 7 + [1] * 5, np.int32), step=step)
    lengths = [
        simulate.prompt_length(recorded, tokens, Conditions(decode_only=True))
        for tokens in simulate.streams(recorded)
    ]
    assert lengths == [5, 2]
    outcome = simulate.replay(recorded, "lru", 0.5, Conditions(decode_only=True))
    assert outcome.per_stream[:, 0].tolist() == [2 * 9, 3 * 9]


@pytest.mark.parametrize("sequential", [False, True])
def test_after_a_prompt_every_policy_has_the_last_token_resident(sequential):
    """The first decoded token repeats the prompt's last one: all of it hits, whatever the policy.

    And no other does: the second decoded token has the prompt's first experts, which have left.
    """
    rows = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [6, 7, 8], [0, 1, 2]]
    experts = np.array(rows, np.uint8)[:, None]
    recorded = Trace(experts, np.zeros(5, np.int32), 9)
    conditions = Conditions(sequential=sequential, decode_only=True, prompt_tokens=3)
    for name in policies.available():
        if "bypass" not in name:
            outcome = simulate.replay(recorded, name, 1.0, conditions)
            assert (outcome.requests, outcome.hits) == (6, 3), name


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sequential": True, "as_recorded": True}, "no recorded passes"),
        ({"decode_only": True, "interleaved": 8}, "one sequence after another"),
        ({"decode_only": True, "as_recorded": True}, "single tokens"),
        ({"prompt_tokens": 3}, "is for decode only"),
        ({"decode_only": True, "prompt_tokens": 0}, "at least 1 token"),
        ({"decode_only": True}, "does not say how long its prompts are"),
        ({"decode_only": True, "prompt_tokens": 60}, "no sequence is longer than its prompt"),
    ],
)
def test_conditions_that_make_no_sense_are_one_sentence(settings, said):
    with pytest.raises(FlashMoEError, match=said):
        simulate.replay(random_trace(), "lru", 0.5, Conditions(**settings))


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_real_routing_behaves_as_real_routing(path):
    """On 1,000 real tokens: more slots hit more, nobody beats Belady, frequency beats random."""
    whole = trace.load(path)
    recorded = Trace(whole.experts[:1000], whole.sequence[:1000], whole.n_experts)
    rates = {}
    for policy in ("fifo", "lru", "lfu", "belady"):
        rates[policy] = [
            simulate.replay(recorded, policy, f).hit_rate for f in (0.25, 0.5, 0.75, 1)
        ]
        assert rates[policy] == sorted(rates[policy])
    for policy in ("fifo", "lru", "lfu"):
        assert all(a <= b for a, b in zip(rates[policy], rates["belady"], strict=True))
        assert rates[policy][1] > 0.5  # a random router would hit exactly half


def test_at_the_least_capacity_all_policies_tie():
    recorded = random_trace(top_k=4)
    admitting = Conditions(bypass=False)
    names = [name for name in policies.available() if name != "belady-bypass"]
    hits = {simulate.replay(recorded, name, 0.01, admitting).hits for name in names}
    assert len(hits) == 1


def test_of_a_fraction_of_slots_the_lowest_layers_have_one_more():
    recorded = random_trace()
    three, four, between = (
        simulate.replay(recorded, "lru", 1.0, slots=slots).counted for slots in (3, 4, 11 / 3)
    )
    np.testing.assert_array_equal(between, np.concatenate([four[:2], three[2:]]))


def test_bypass_is_granted_unless_it_is_not():
    """To policies that make use of it; with it, Belady's bound rises."""
    recorded = random_trace(tokens=200)
    without = Conditions(bypass=False)
    for name in policies.available():
        both = [simulate.replay(recorded, name, 0.4, how).hits for how in (Conditions(), without)]
        assert (both[0] != both[1]) == (name == "learned")
    bound = simulate.replay(recorded, "belady-bypass", 0.4).hits
    assert bound > simulate.replay(recorded, "belady", 0.4).hits


def test_with_room_for_all_only_first_uses_miss():
    recorded = random_trace()
    outcome = simulate.replay(recorded, "fifo", 1.0, Conditions(warm=True))
    firsts = sum(len(np.unique(recorded.experts[:, x])) for x in range(recorded.n_layers))
    assert outcome.requests - outcome.hits == firsts


@pytest.mark.parametrize("capacity", [0, -1, 1.5, float("nan")])
def test_capacity_out_of_range_is_refused(capacity):
    with pytest.raises(FlashMoEError, match="capacity"):
        simulate.replay(random_trace(), "lru", capacity)


def partly_computed(steps: list[tuple[int, int]]) -> Trace:
    """Forward passes of so many tokens, of which the last layer computes only the last so many."""
    whole = random_trace()
    tokens = sum(count for count, _ in steps)
    computed = np.ones((tokens, whole.n_layers), bool)
    computed[:, -1] = np.concatenate([np.arange(count) >= count - last for count, last in steps])
    return Trace(
        whole.experts[:tokens], np.zeros(tokens, np.int32), whole.n_experts,
        step=np.repeat(np.arange(len(steps), dtype=np.int32), [count for count, _ in steps]),
        computed=computed,
    )  # fmt: skip


@pytest.mark.parametrize("as_recorded", [False, True])
def test_what_a_layer_did_not_compute_is_never_requested(as_recorded):
    recorded = partly_computed([(5, 1), (4, 0), (1, 1), (3, 3)])
    filler = recorded.experts.copy()
    filler[~recorded.computed] = np.arange(recorded.top_k)
    conditions = Conditions(as_recorded=as_recorded)
    for policy in policies.available():
        outcome = simulate.replay(recorded, policy, 0.5, conditions)
        other = simulate.replay(replace(recorded, experts=filler), policy, 0.5, conditions)
        np.testing.assert_array_equal(outcome.counted, other.counted)
    last = recorded.experts[recorded.computed[:, -1], -1]
    wanted = [len(np.unique(rows)) for rows in (last[:1], last[1:2], last[2:])]
    requests = outcome.counted[-1, 0, 0]
    assert requests == (sum(wanted) if as_recorded else last.size)


def test_a_layer_that_computed_nothing_has_no_request():
    recorded = partly_computed([(5, 0), (4, 0)])
    for policy in policies.available():
        outcome = simulate.replay(recorded, policy, 0.5, Conditions(as_recorded=True))
        assert outcome.counted[-1].tolist() == [[0, 0]]
        assert outcome.requests > 0
