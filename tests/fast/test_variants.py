"""Routing of other geometries, made of a recorded one."""

from __future__ import annotations

import numpy as np
import pytest

import flashmoe
from flashmoe import trace
from flashmoe.train.variants import merged, strongest, variants


@pytest.fixture(scope="module")
def demo():
    return trace.load(flashmoe.demo_routing_path()).first(300)


def test_variants_are_routing_that_can_be_saved_and_read(demo, tmp_path):
    geometries = []
    for number, made in enumerate(variants(demo)):
        made.save(tmp_path / f"{number}.npz")
        read = trace.load(tmp_path / f"{number}.npz")  # it refuses what no router can choose
        assert (read.experts == made.experts).all()
        assert demo.info["model"] in read.info["model"]
        geometries.append((read.n_layers, read.n_experts, read.top_k))
    assert geometries == [(8, 128, 16), (5, 192, 24), (16, 64, 4)]


def test_a_merged_layer_chooses_what_its_layers_chose(demo):
    made = merged(demo, np.array([[0, 3], [2, 1]]))
    for token in (0, 17):
        chosen = {layer * 64 + expert for layer, expert in zip(
            [0] * 8 + [1] * 8,
            [*demo.experts[token, 2].tolist(), *demo.experts[token, 1].tolist()],
            strict=True,
        )}  # fmt: skip
        assert set(made.experts[token, 1].tolist()) == chosen
    first = made.experts[:, 0, :8] == demo.experts[:, 0]
    assert first.all()
    assert (made.weights[:, 0, 8:] == demo.weights[:, 3]).all()


def test_the_strongest_are_those_of_the_greatest_weight(demo):
    made = strongest(demo, 2)
    kept = np.sort(made.weights.astype(np.float32), axis=-1)
    assert (kept == np.sort(demo.weights.astype(np.float32), axis=-1)[..., -2:]).all()
    for token, layer in ((0, 0), (250, 15)):
        of = dict(zip(demo.experts[token, layer].tolist(), demo.weights[token, layer], strict=True))
        for expert, weight in zip(
            made.experts[token, layer], made.weights[token, layer], strict=True
        ):
            assert of[int(expert)] == weight


def test_what_was_not_computed_is_merged_with_nothing(demo):
    demo = trace.load(flashmoe.demo_routing_path()).first(20)
    demo.computed = np.ones((20, 16), bool)
    assert [made.top_k for made in variants(demo)] == [4]
    demo.weights = None
    assert variants(demo) == []
