"""Linear layers whose weights lie as oneDNN multiplies them: the same bits, or left alone."""

from __future__ import annotations

import copy
import pickle
import weakref

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, make_checkpoint, prompt
from torch import nn

import flashmoe
from baselines.in_memory import with_own_memory
from flashmoe import kernels
from flashmoe.engines.transformers.checkpoints.pack import pack
from flashmoe.engines.transformers.model import packed_linear
from flashmoe.engines.transformers.model.packed_linear import PackedLinear

LARGER = dict(
    vocab_size=1024, hidden_size=768, intermediate_size=1024, num_hidden_layers=2,
    num_attention_heads=6, num_key_value_heads=6,
)  # fmt: skip


def linear(out: int, inside: int, bias: bool = False) -> nn.Linear:
    torch.manual_seed(out)
    return nn.Linear(inside, out, bias).bfloat16()


def packed(*layers: nn.Module) -> nn.ModuleList:
    """The layers, packed where that is right."""
    model = nn.ModuleList(layers)
    packed_linear.pack_all(model)
    return model


def packs() -> bool:
    return isinstance(packed(linear(1024, 600))[0], PackedLinear)


needs_kernel = pytest.mark.skipif(not packs(), reason="oneDNN has no such kernel here")


@needs_kernel
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_output_is_transformers_own(tmp_path, family, batch):
    heads = {"head_dim": 128} if "head_dim" in FAMILIES[family] else {}
    make_checkpoint(family, tmp_path / "checkpoint", torch.bfloat16, **LARGER | heads)
    pack(tmp_path / "checkpoint", tmp_path / "store")
    own = with_own_memory(
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "checkpoint", experts_implementation="eager"
        )
    )
    model = flashmoe.load(tmp_path / "store", memory="100MB", policy="lru")
    ids = prompt(9, batch)
    layers = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert layers
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            assert torch.equal(model(ids).logits, own(ids).logits)
    outputs = [
        m.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        for m in (model, own)
    ]
    assert torch.equal(*outputs)
    # nothing that transformers does has read a weight
    assert all(isinstance(m, PackedLinear) for m in layers)
    assert torch.equal(model(ids).logits, own(ids).logits)  # with gradients, which need weights
    assert all(type(m) is nn.Linear for m in layers)
    model.flashmoe.close()


@needs_kernel
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 70),
    out=st.integers(700, 1500),
    inside=st.integers(800, 1200),
    bias=st.booleans(),
)
def test_the_same_bits_at_any_shape(rows, out, inside, bias):
    layer = linear(out, inside, bias)
    x = torch.randn(2, rows, inside).bfloat16()
    with torch.inference_mode():
        wanted = layer(x)
        assert torch.equal(packed(layer)[0](x), wanted)  # or other bits found, and left alone


@needs_kernel
@pytest.mark.parametrize(
    "read",
    [
        lambda layer: layer.weight,
        lambda layer: next(layer.parameters()),
        lambda layer: dict(layer.named_parameters())["weight"],
        lambda layer: layer.get_parameter("weight"),
        lambda layer: layer.state_dict()["weight"],
        lambda layer: copy.deepcopy(layer).weight,
        lambda layer: pickle.loads(pickle.dumps(layer)).weight,
        lambda layer: copy.deepcopy(layer).float().weight.bfloat16(),
    ],
)
def test_whoever_reads_the_weight_gets_it(read):
    layer = linear(1024, 600, bias=True)
    (other,) = packed(layer)
    assert isinstance(other, PackedLinear)
    assert torch.equal(read(other), layer.weight)
    assert type(other) is nn.Linear
    x = torch.randn(3, 600).bfloat16()
    assert torch.equal(other(x), layer(x))
    assert torch.equal(other.bias, layer.bias)


@needs_kernel
def test_what_changes_nothing_leaves_it_packed():
    (layer,) = packed(linear(1024, 600, bias=True))
    assert "bias=True" in repr(layer.to("cpu").bfloat16().cpu().eval())
    assert isinstance(layer, PackedLinear)


@needs_kernel
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_those_of_the_linear_layer(frozen):
    layer = linear(1024, 600, bias=True).requires_grad_(not frozen)
    (other,) = packed(copy.deepcopy(layer))
    x = torch.randn(3, 600).bfloat16().requires_grad_()
    found = []
    for each in (layer, other):
        each(x).float().square().sum().backward()
        found.append([x.grad, each.weight.grad, each.bias.grad])
        x.grad = None
    for own, its in zip(*found, strict=True):
        assert (own is None) == (its is None) == (frozen and own is not found[0][0])
        assert own is None or torch.equal(own, its)


def test_small_tied_and_other_weights_are_left_alone():
    tied, head = nn.Embedding(1024, 600).bfloat16(), linear(1024, 600)
    head.weight = tied.weight
    left = packed(
        tied, head, linear(64, 600), linear(1024, 600).float(), linear(64, 900).to("meta")
    )
    assert not any(isinstance(layer, PackedLinear) for layer in left)


@needs_kernel
def test_other_bits_are_noticed(monkeypatch):
    product = kernels.packed.product
    monkeypatch.setattr(kernels.packed, "product", lambda *a: product(*a) * 1.01)
    assert not isinstance(packed(linear(1024, 600))[0], PackedLinear)


@needs_kernel
def test_each_plain_weight_is_freed_before_the_next_is_packed(monkeypatch):
    layers = nn.ModuleList(linear(1024, 600) for _ in range(3))
    weights = [weakref.ref(layer.weight) for layer in layers]
    alive = []
    monkeypatch.setattr(
        packed_linear, "_trim_heap", lambda: alive.append(sum(w() is not None for w in weights))
    )
    packed_linear.pack_all(layers)
    assert alive == [2, 1, 0]
