"""Linear layers whose weights lie as oneDNN multiplies them: the same bits, or left alone."""

from __future__ import annotations

import pytest
import torch
import transformers
from conftest import FAMILIES, make_checkpoint, prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import flashmoe
from baselines.in_memory import with_own_memory
from flashmoe import packed_linear
from flashmoe.packed_linear import PackedLinear
from flashmoe.store.pack import pack

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
    packer = packed_linear.Packer(model)
    for number in range(len(layers)):
        packer.pack(str(number))
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
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            assert torch.equal(model(ids).logits, own(ids).logits)
    outputs = [
        m.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        for m in (model, own)
    ]
    assert torch.equal(*outputs)
    layers = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert layers
    assert all(m.packed for m in layers)  # nothing that transformers does has read a weight
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
def test_whoever_reads_the_weight_gets_it():
    layer = linear(1024, 600, bias=True)
    (other,) = packed(layer)
    assert other.packed
    assert torch.equal(other.weight, layer.weight)
    assert not other.packed
    x = torch.randn(3, 600).bfloat16()
    assert torch.equal(other(x), layer(x))


def test_small_tied_and_other_weights_are_left_alone():
    tied, head = nn.Embedding(1024, 600).bfloat16(), linear(1024, 600)
    head.weight = tied.weight
    left = packed(
        tied, head, linear(64, 600), linear(1024, 600).float(), linear(64, 900).to("meta")
    )
    assert not any(isinstance(layer, PackedLinear) for layer in left)


@needs_kernel
def test_other_bits_are_noticed(monkeypatch):
    product = packed_linear._product
    monkeypatch.setattr(packed_linear, "_product", lambda *a: product(*a) * 1.01)
    assert not isinstance(packed(linear(1024, 600))[0], PackedLinear)
