"""Ways to multiply: right, the same bits in any company, and chosen once for a machine."""

from __future__ import annotations

import copy
import itertools
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import numba
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_checkpoint, prompt
from torch import nn

import flashmoe
from flashmoe.engines.transformers.experts import lone_token
from flashmoe.engines.transformers.experts.lone_token import LoneToken
from flashmoe.engines.transformers.experts.precision import Precision
from flashmoe.engines.transformers.model import packed_linear
from flashmoe.engines.transformers.model.fast_linear import FastLinear, hasten_all
from flashmoe.kernels import by_rows, by_tiles, choice
from flashmoe.kernels.choice import TOKENS, WAYS, Choice, Shape
from flashmoe.quant import fp8, small_floats
from flashmoe.quant.mxfp4 import E2M1


@pytest.fixture(autouse=True)
def as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    choice.choice.cache_clear()


@pytest.fixture
def every_way(monkeypatch):
    """A function that has one way taken everywhere."""

    def take(way: str) -> None:
        monkeypatch.setattr(choice, "choice", lambda shape: _only(way, shape))

    return take


def _only(way: str, shape: Shape) -> Choice:
    way = "torch" if way == "rows" and shape.transposed else way
    return Choice((way,) * len(TOKENS), False)


def bf16(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def error(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> float:
    """Against float64."""
    return float((found.double() - x.double() @ weight.double().T).abs().mean())


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(WAYS)), st.integers(1, 20), st.integers(1, 700), st.integers(1, 300))
def test_every_way_is_no_less_accurate_than_torch(way, tokens, rows, columns):
    x, weight = bf16(tokens, columns), bf16(rows, columns, seed=1)
    found = WAYS[way](x, weight).to(x.dtype)
    assert found.shape == (tokens, rows)
    assert error(found, x, weight) <= 1.02 * error(nn.functional.linear(x, weight), x, weight)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 400), st.integers(1, 200))
def test_rows_have_the_same_bits_in_any_company(tokens, rows, columns):
    """Of any other tokens, rows, weights and threads."""
    x, weight = bf16(tokens, columns), bf16(rows, columns, seed=1)
    torch.set_num_threads(2)
    whole = by_rows.product(x, weight)
    many = by_rows.products(torch.stack([x] * 3), [weight, bf16(rows, columns), weight])
    torch.set_num_threads(1)
    assert torch.equal(whole, by_rows.product(x, weight))
    assert torch.equal(whole, many[0])
    assert torch.equal(whole, many[2])
    assert torch.equal(whole[:1, -1:], by_rows.product(x[:1], weight[-1:]))


_FEWER = """
import torch
from flashmoe.kernels import by_rows
torch.set_num_threads(4)
weight = torch.ones(4096, 64, dtype=torch.bfloat16)
for _ in range(3):
    assert (by_rows.product(weight[:2], weight) == 64).all()
"""


@pytest.mark.parametrize("setting", ["OMP_THREAD_LIMIT=2", "OMP_DYNAMIC=true", "OMP_NUM_THREADS=1"])
def test_all_is_computed_where_fewer_threads_start(setting):
    name, value = setting.split("=")
    done = subprocess.run(
        [sys.executable, "-c", _FEWER],
        env=os.environ | {name: value},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("way", WAYS)
def test_a_products_rows_are_contiguous(every_way, way):
    """Else attention's fused kernel does not take them, and [tokens, tokens] weights are made."""
    every_way(way)
    assert choice.product(bf16(40, 64), bf16(96, 64, seed=1)).is_contiguous()


def test_tiles_take_a_weight_of_any_strides():
    x, weight = bf16(5, 70), bf16(70, 1100, seed=1)
    assert torch.equal(by_tiles.product(x, weight.T), by_tiles.product(x, weight.T.contiguous()))


@numba.njit
def _decoded(low, high, eight, out):
    for byte in range(256):
        both = np.int32(byte)
        out[0, byte], out[1, byte], out[2, byte] = low(both), high(both), eight(both)


def test_all_small_floats_are_what_they_stand_for():
    out = np.empty((3, 256), np.float32)
    functions = small_floats.low_e2m1, small_floats.high_e2m1, fp8._number
    compiled = [numba.njit(lambda byte, f=function: f(byte)) for function in functions]
    _decoded(*compiled, out)
    byte = np.arange(256)
    assert np.array_equal(out[0] * small_floats.E2M1_UNIT, np.array(E2M1, np.float32)[byte & 15])
    assert np.array_equal(out[1] * small_floats.E2M1_UNIT, np.array(E2M1, np.float32)[byte >> 4])
    known = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(out[2] * small_floats.E4M3_UNIT, known, equal_nan=True)


def test_a_choice_is_made_once_for_a_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shape, measured = Shape(96, 64), []

    def measure(shape: Shape) -> Choice:
        measured.append(shape)
        return Choice(("rows", "tiles", *["torch"] * (len(TOKENS) - 2)), packed=False)

    monkeypatch.setattr(choice, "_switches", lambda: 0)
    monkeypatch.setattr(choice, "_measure", measure)
    first = choice.choice(shape)
    choice.choice.cache_clear()  # as another process
    assert choice.choice(shape) == first
    assert measured == [shape]
    assert str(first) == "rows to 1, tiles to 2, torch to 128"
    (path,) = (tmp_path / "flashmoe" / "kernels").iterdir()
    for damage in ("", "[]", json.dumps({"ways": {str(t): "nope" for t in TOKENS}, "packed": 0})):
        path.write_text(damage)
        choice.choice.cache_clear()
        assert choice.choice(shape) == first
        choice.choice.cache_clear()
        assert choice.choice(shape) == first
    assert len(measured) == 4
    # whoever measures while another process does takes what the other one kept
    other = Choice(("torch",) * len(TOKENS), packed=True)
    choice._keep(path.with_name("new.json"), other)
    assert choice._keep(path.with_name("new.json"), first) == other
    assert {p.name for p in path.parent.iterdir()} == {path.name, "new.json"}


def test_what_was_measured_on_a_busy_processor_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    switches, measured = itertools.count(0, 1 << 40), []
    monkeypatch.setattr(choice, "_switches", lambda: next(switches))
    slow = Choice(("torch",) * len(TOKENS), packed=False)
    monkeypatch.setattr(choice, "_measure", lambda shape: measured.append(shape) or slow)
    shape = Shape(96, 64)
    assert choice.choice(shape) == choice.choice(shape) == slow
    assert measured == [shape] * 3
    assert not (tmp_path / "flashmoe" / "kernels").exists()


def test_a_choice_that_cannot_be_kept_is_made_all_the_same(tmp_path, monkeypatch):
    (tmp_path / "flashmoe").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for shape in (Shape(128, 64), Shape(128, 64, True)):
        found = choice.choice(shape)
        assert set(found.ways) <= WAYS.keys() - ({"rows"} if shape.transposed else set())


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fast")

    def made(family: str):
        path = folder / family
        return path if path.exists() else make_checkpoint(family, path, torch.bfloat16)

    return made


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "mixtral", "deepseek_v2", "qwen3_moe"])
@pytest.mark.parametrize("way", WAYS)
def test_a_plain_model_has_the_same_bits_at_every_budget(checkpoints, every_way, family, way):
    every_way(way)
    path = checkpoints(family)
    ids, given = prompt(9), []
    with loaded(path, "1GiB") as model:
        least = model.flashmoe.manifest.top_k * sum(
            layer.extent_bytes for layer in model.flashmoe.manifest.layers
        )
    for memory, policy in ((least, "lru"), (least * 2, "learned"), ("1GiB", "learned")):
        with loaded(path, memory, policy=policy, arithmetic="fast") as model:
            assert model.flashmoe.stats()["kernels"]
            given.append(logits(model, ids))
    assert torch.equal(given[0], given[1])
    assert torch.equal(given[0], given[2])
    plain = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    exact = logits(plain, ids)
    assert (given[0] - exact).abs().max() < 0.05 * exact.abs().max()


@contextmanager
def loaded(path, memory, **options):
    """A model, closed at the end."""
    model = flashmoe.load(path, memory=memory, **options)
    try:
        yield model
    finally:
        model.flashmoe.close()


@torch.inference_mode()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    """Of a prompt, and of five tokens after it, one by one."""
    first = model(ids, use_cache=True)
    found, past = [first.logits[0].float()], first.past_key_values
    for token in range(5):
        out = model(torch.tensor([[token + 3]]), past_key_values=past, use_cache=True)
        found.append(out.logits[0].float())
    return torch.cat(found)


@pytest.mark.parametrize("way", WAYS)
def test_the_demo_model_is_no_less_accurate(every_way, way):
    every_way(way)
    ids = torch.tensor([[*range(40, 104)]])
    path = flashmoe.demo_path()
    double = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float64, experts_implementation="eager"
    )
    with torch.inference_mode():
        true = double(ids).logits
    off = {}
    for arithmetic in ("exact", "fast"):
        with loaded(path, "1GiB", arithmetic=arithmetic) as model, torch.inference_mode():
            single = torch.cat([model(ids).logits[:, :-1], model(ids[:, :1]).logits], 1)
            off[arithmetic] = float((single[:, :-1].double() - true[:, :-1]).abs().mean())
    assert off["fast"] <= 1.05 * off["exact"]


@pytest.mark.parametrize("width", [64, 128, 72])
def test_a_lone_tokens_experts_have_the_same_bits_alone_and_together(every_way, width):
    every_way("rows")
    module = SimpleNamespace(
        has_gate=True, has_bias=False, has_post_expert_norm=False, is_transposed=False,
        act_fn=nn.functional.silu,
        _apply_gate=lambda both: nn.functional.silu(both[:, :width]) * both[:, width:],
    )  # fmt: skip
    experts = [
        {"gate_up_proj": bf16(2 * width, 96, seed=n), "down_proj": bf16(96, width, seed=n + 9)}
        for n in range(6)
    ]
    hidden, weights = bf16(1, 96), torch.rand(1, 6)
    order = [4, 0, 5, 1, 3, 2]
    totals = []
    for groups in ([[0, 1, 2, 3, 4, 5]], [[n] for n in order], [[5, 2], [0], [1, 3, 4]]):
        token = LoneToken(module, hidden, weights, order, Precision(None, torch.bfloat16))
        for group in groups:
            token.add_all([(n, experts[n]) for n in group])
        totals.append(token.total())
    assert torch.equal(totals[0], totals[1])
    assert torch.equal(totals[0], totals[2])
    assert token._most_at_once(experts[0]) == (1 if width % 64 else (1 << 15) // (2 * width))
    assert lone_token.shape_of(experts[0]["down_proj"], False) == Shape(96, width)


@pytest.fixture
def layers(every_way, monkeypatch):
    every_way("rows")
    monkeypatch.setattr(packed_linear, "PACK_FROM_BYTES", 0)
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(40, 24), nn.Linear(24, 40, bias=False)]).bfloat16()
    plain = copy.deepcopy(layers)
    hasten_all(layers)
    assert all(type(layer) is FastLinear for layer in layers)
    return layers, plain


def test_a_fast_layer_is_used_as_any_other(layers):
    fast, plain = layers
    x = bf16(2, 3, 40)
    with torch.inference_mode():
        found, wanted = fast[1](fast[0](x)), plain[1](plain[0](x))
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < 0.03
    assert all(
        torch.equal(a, b) for a, b in zip(fast.parameters(), plain.parameters(), strict=True)
    )
    assert torch.equal(copy.deepcopy(fast)[0](x), plain[0](x))  # a gradient may be wanted
    assert torch.equal(fast.float()[0](x.float()), plain.float()[0](x.float()))


def test_gradients_of_a_fast_layer_are_torchs(layers):
    given = []
    for some in layers:
        x = bf16(3, 40).requires_grad_()
        some[1](some[0](x)).sum().backward()
        given.append((x.grad, some[0].weight.grad))
    assert torch.equal(given[0][0], given[1][0])
    assert torch.equal(given[0][1], given[1][1])
