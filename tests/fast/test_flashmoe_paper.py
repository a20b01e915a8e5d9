"""The paper's policy in its three readings, against networks written out in NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe import policies
from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.errors import FlashMoEError
from flashmoe.events import Event
from flashmoe.policies import flashmoe_paper
from flashmoe.policies.base import Scope
from flashmoe.policies.flashmoe_paper import Networks
from flashmoe.policies.parts import policy_file

EXPERTS, SLOTS, LAYERS = 6, 3, 2
INPUTS = {"scorer": 2, "vector": 2 * SLOTS, "experts": 2 * EXPERTS}


def random_networks(reading: str, slots: int = SLOTS, seed: int = 0) -> Networks:
    rng = np.random.default_rng(seed)
    shapes = flashmoe_paper.shapes(LAYERS, INPUTS[reading], 5)
    network = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return Networks(reading, {slots: network})


def outputs(networks: Networks, layer: int, x: list[float]) -> np.ndarray:
    network = {name: tensor[layer].astype(float) for name, tensor in networks.nearest(0).items()}
    h = np.array(x)
    for number in "12":
        h = h @ network[f"w{number}"] + network[f"b{number}"]
        h = h / (1 + np.exp(-h))
    return h @ network["w3"] + network["b3"]


@pytest.mark.parametrize("reading", flashmoe_paper.READINGS)
def test_the_victim_is_the_highest_scored(reading):
    networks = random_networks(reading)
    layer = 1
    policy = policies.get("flashmoe-paper").policy_class(
        Scope(EXPERTS, 1, 1, layer, LAYERS), SLOTS, networks=networks
    )
    rng = np.random.default_rng(1)
    slots: list[int] = []  # by slot, its expert
    uses, last_use = [0] * EXPERTS, [0] * EXPERTS
    victims = []
    for step in range(1, 60):
        expert = int(rng.integers(EXPERTS))
        policy.touch(Event.of_rows([[expert]]), step - 1)
        uses[expert] += 1
        last_use[expert] = step

        def seen(key: int, step: int = step) -> list[float]:
            return [1 / (step - last_use[key] + 1) if uses[key] else 0, uses[key] / max(uses)]

        if expert in slots:
            continue
        if len(slots) < SLOTS:
            slots.append(expert)
            continue
        if reading == "scorer":
            scores = {key: outputs(networks, layer, seen(key))[0] for key in slots}
        elif reading == "vector":
            y = outputs(networks, layer, [number for key in slots for number in seen(key)])
            scores = {key: y[slot] for slot, key in enumerate(slots)}
        else:
            y = outputs(networks, layer, [n for key in range(EXPERTS) for n in seen(key)])
            scores = {key: abs(y[key]) for key in slots}
        victim = policy.victim(np.array(slots))
        assert victim == max(scores, key=scores.__getitem__)
        victims.append(victim)
        slots[slots.index(victim)] = expert
    assert len(set(victims)) > 1


@settings(deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.lists(st.integers(0, 8), min_size=1, max_size=5), st.booleans()), max_size=40
    )
)
def test_every_resident_has_an_input_of_its_own(steps):
    """Also where most of a cache is evicted at once, as after a prompt."""
    policy = policies.get("flashmoe-paper")(Scope(9), 4)
    cache = ExpertCache(policy)
    for keys, is_end_of_prompt in steps:
        if is_end_of_prompt:
            cache.evict_all_but(np.unique(keys))
        list(cache.waves(Event.of_rows([[key] for key in keys])))
        slots = policy.slot[cache.resident].tolist()
        assert len(set(slots)) == len(slots)
        assert all(0 <= slot < 4 for slot in slots)
        waiting = policy.waiting[: policy.counts[flashmoe_paper.N_WAITING]].tolist()
        assert not waiting
        free = policy.free[: policy.counts[flashmoe_paper.N_FREE]].tolist()
        assert sorted(free + slots) == [0, 1, 2, 3]


@pytest.mark.parametrize("reading", flashmoe_paper.READINGS)
def test_what_is_saved_is_loaded(reading, tmp_path):
    networks = random_networks(reading)
    path = tmp_path / "p.safetensors"
    flashmoe_paper.save(path, networks, {"seed": 0})
    loaded = flashmoe_paper.load(path)
    assert (loaded.reading, list(loaded.by_slots)) == (reading, [SLOTS])
    for name, tensor in networks.by_slots[SLOTS].items():
        np.testing.assert_array_equal(loaded.by_slots[SLOTS][name], tensor)


def test_the_nearest_number_of_slots_has_its_networks():
    both = {n: random_networks("scorer", seed=n).by_slots[SLOTS] for n in (8, 32)}
    networks = Networks("scorer", both)
    for slots, nearest in ((4, 8), (19, 8), (21, 32), (64, 32)):
        assert networks.nearest(slots) is both[nearest]


def test_networks_for_another_geometry_are_refused(tmp_path):
    make = policies.get("flashmoe-paper").policy_class
    with pytest.raises(FlashMoEError, match="are for 3 slots, not 4"):
        make(Scope(EXPERTS), 4, networks=random_networks("vector"))
    with pytest.raises(FlashMoEError, match="are for 6 experts, not 7"):
        make(Scope(7), SLOTS, networks=random_networks("experts"))


@pytest.mark.parametrize(
    ("tensors", "about"),
    [
        ({}, {"reading": "scorer"}),
        ({"3.w1": np.zeros((1, 2, 5), np.float32)}, {"reading": "scorer"}),
        ({"w1": np.zeros((1, 2, 5), np.float32)}, {"reading": "scorer"}),
        (None, {"reading": "magic"}),
        (None, {}),
    ],
)
def test_a_file_of_other_networks_is_refused(tensors, about, tmp_path):
    path = tmp_path / "p.safetensors"
    if tensors is None:
        whole = random_networks("scorer").by_slots[SLOTS]
        tensors = {f"{SLOTS}.{name}": tensor for name, tensor in whole.items()}
    policy_file.save(path, flashmoe_paper.KIND, tensors, about)
    with pytest.raises(FlashMoEError, match="of another version"):
        flashmoe_paper.load(path)


@pytest.mark.parametrize("reading", flashmoe_paper.READINGS)
def test_the_shipped_networks_are_of_the_demo_model(reading):
    networks = flashmoe_paper.load(Path(flashmoe_paper.SHIPPED[reading]))
    assert list(networks.by_slots) == ([64] if reading == "experts" else [16, 32])
    inputs = {"scorer": 2, "vector": 64, "experts": 128}[reading]
    assert networks.nearest(32)["w1"].shape[:2] == (16, inputs)
