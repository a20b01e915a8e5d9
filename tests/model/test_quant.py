"""Quantised experts: what is computed is what was packed, on every family, at every budget."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, budget, eager, make_checkpoint, prompt

import flashmoe
from flashmoe import quant
from flashmoe.engines.transformers.checkpoints.checkpoint import Checkpoint
from flashmoe.engines.transformers.checkpoints.pack import pack
from flashmoe.engines.transformers.model import moe_modules
from flashmoe.errors import FlashMoEError
from flashmoe.store import manifest as manifests

STEPS = {"int8": 127, "int4": 7.5}  # between zero (or the middle) and the greatest of a row (group)
SIZES = dict(hidden_size=64, intermediate_size=96, moe_intermediate_size=32)


@given(
    st.sampled_from(sorted(quant.quantisers())),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 1 << 20),
    st.floats(1e-4, 100.0),
)
@settings(max_examples=40, deadline=None)
def test_a_weight_comes_back_within_half_a_step(name, dtype, seed, size):
    scheme = quant.quantiser(name)
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(seed)) * size
    parts = scheme.parts(weight.to(dtype))
    assert scheme.shape({k: tuple(p.shape) for k, p in parts.items()}) == (48, 64)
    back = scheme.linear(torch.eye(64, dtype=dtype), parts).T.float()
    half = weight.abs().amax() / STEPS[name] / 2
    rounding = weight.abs().amax() * 16 * torch.finfo(dtype).eps  # of scales, and of the product
    assert (back - weight).abs().max() <= half + rounding


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    made = {}

    def get(family: str, scheme: str):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            sizes = SIZES if family != "mixtral" else SIZES | {"intermediate_size": 64}
            make_checkpoint(family, folder / "checkpoint", **sizes)
            made[family] = folder
        store = made[family] / scheme
        if not store.exists():
            pack(made[family] / "checkpoint", store, quant=scheme)
        return made[family] / "checkpoint", store

    return get


@pytest.mark.parametrize("scheme", quant.quantisers())
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_output_is_that_of_the_same_weights_in_memory(packed, family, scheme):
    checkpoint, store = packed(family, scheme)
    contents = manifests.load(store)
    reference = eager(checkpoint)
    modules = moe_modules.expert_modules(reference)
    sources = {}
    with Checkpoint(checkpoint) as source:
        for layer in contents.layers:
            for expert in range(layer.n_experts):
                sources[layer.module, expert] = source.expert(layer.module, expert)
    maker = quant.quantiser(scheme)
    for (name, expert), tensors in sources.items():
        module = modules[name]
        for key, tensor in tensors.items():
            if tensor.dim() == 2:
                weight = tensor.T if module.is_transposed else tensor
                parts = maker.parts(weight)
                same = maker.linear(torch.eye(weight.shape[1]), parts).T
                getattr(module, key).data[expert] = same.T if module.is_transposed else same
    ids = prompt(17)
    expected = reference(ids).logits
    outputs = []
    for slots in (contents.top_k, contents.layers[0].n_experts):
        model = flashmoe.load(store, memory=budget(store, slots), policy="lru")
        outputs.append(model(ids).logits)
        model.flashmoe.close()
    assert torch.equal(*outputs)
    torch.testing.assert_close(outputs[0], expected, rtol=1e-3, atol=1e-3)


def test_a_quantised_store_is_smaller_and_says_what_it_is(packed):
    sizes = {}
    for scheme in quant.quantisers():
        _, store = packed("olmoe", scheme)
        contents = manifests.load(store)
        assert contents.quantisation == scheme
        sizes[scheme] = sum(t.size_bytes for t in contents.layers[0].tensors)
    checkpoint, _ = packed("olmoe", "int8")
    plain = pack(checkpoint, checkpoint.parent / "none")
    whole = sum(t.size_bytes for t in plain.layers[0].tensors)
    assert whole / sizes["int8"] > 3.7  # of float32
    assert sizes["int8"] / sizes["int4"] > 1.3


def test_a_store_for_another_processor_is_refused(packed, monkeypatch):
    _, store = packed("olmoe", "int4")
    monkeypatch.setattr(quant.quantisers()["int4"], "layout", lambda self: "another")
    with pytest.raises(FlashMoEError, match="another processor"):
        manifests.load(store)


def test_widths_that_int4_cannot_take_are_one_sentence(tmp_path):
    make_checkpoint("olmoe", tmp_path / "checkpoint")
    with pytest.raises(FlashMoEError, match="--quant int8"):
        pack(tmp_path / "checkpoint", tmp_path / "store", quant="int4")
    with pytest.raises(FlashMoEError, match="choose from none"):
        pack(tmp_path / "checkpoint", tmp_path / "store", quant="int2")
    assert not (tmp_path / "store").exists()
