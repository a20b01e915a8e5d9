"""Checkpoints that were published quantised: read as they lie, computed as their plain form is."""

from __future__ import annotations

import json
import shutil
from contextlib import closing

import pytest
import torch
import transformers
from checkpoint_files import configure, rewrite, tensors_of
from hypothesis import given, settings
from hypothesis import strategies as st
from published_checkpoints import FORMATS, fp8, make, mxfp4, settings_of
from tiny import eager, prompt, run
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.quantizers import AutoQuantizationConfig

import flashmoe
from baselines.in_memory import with_own_memory
from flashmoe import quant
from flashmoe.engines.transformers.checkpoints import backends
from flashmoe.engines.transformers.checkpoints.checkpoint import Checkpoint
from flashmoe.engines.transformers.checkpoints.pack import pack
from flashmoe.errors import FlashMoEError
from flashmoe.quant.by_rows import FEW
from flashmoe.residency import budget
from flashmoe.store import manifest as manifests

EACH = pytest.mark.parametrize("kind", FORMATS)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(published, plain, a store of the published one) of a kind."""
    known = {}

    def get(kind: str):
        if kind not in known:
            if kind == "compressed":
                pytest.importorskip("compressed_tensors")
            folder = tmp_path_factory.mktemp(kind)
            published, plain = make(kind, folder)
            pack(published, folder / "store")
            known[kind] = published, plain, folder / "store"
        return known[kind]

    return get


@EACH
@pytest.mark.parametrize("where", ["in place", "packed"])
def test_output_is_that_of_the_plain_model(made, kind, where):
    published, plain, store = made(kind)
    path = store if where == "packed" else published
    ids = prompt(9)
    expected = run(eager(plain), ids)
    with closing(backends.open_path(path)) as backend:
        least = budget.least_bytes(backend.manifest)
    for memory in (least, 4 * least):
        model = flashmoe.load(path, memory=memory)
        tokens, logits = run(model, ids)
        model.flashmoe.close()
        assert torch.equal(tokens, expected[0])
        assert torch.equal(logits, expected[1])


@pytest.mark.parametrize("kind", [kind for kind, of in FORMATS.items() if of.by_transformers])
def test_the_plain_model_is_what_transformers_makes(made, kind):
    published, plain, _ = made(kind)
    theirs = AutoQuantizationConfig.from_dict(settings_of(published) | {"dequantize": True})
    dequantised = transformers.AutoModelForCausalLM.from_pretrained(
        published, quantization_config=theirs, experts_implementation="eager"
    )
    expected = eager(plain).state_dict()
    for name, tensor in dequantised.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    ids = prompt(9)
    assert torch.equal(run(with_own_memory(dequantised), ids)[1], run(eager(plain), ids)[1])


@EACH
def test_a_slot_holds_the_published_bytes(made, kind):
    published, _, store = made(kind)
    experts = [
        tensor
        for name, tensor in tensors_of(published).items()
        if ".experts." in name and not name.endswith("weight_shape")
    ]
    layers = manifests.load(store).layers
    held = sum(layer.n_experts * sum(t.size_bytes for t in layer.tensors) for layer in layers)
    assert held == sum(tensor.nbytes for tensor in experts)
    assert {layer.quantisation for layer in layers} == {FORMATS[kind].name}


@EACH
def test_quantising_it_again_begins_with_the_plain_numbers(made, kind, tmp_path):
    published, plain, _ = made(kind)
    stores = [pack(path, tmp_path / path.name, quant="int8") for path in (published, plain)]
    first, second = ([layer.checksums for layer in store.layers] for store in stores)
    assert first == second


@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([8, 16]))
@settings(max_examples=30, deadline=None)
def test_fp8_blocks_of_any_weight(rows, columns, block):
    parts, numbers = fp8(torch.randn(rows, columns), block)
    values, scales = parts.values()
    kinds = {"values": (values.dtype, tuple(values.shape)), "scales": (scales.dtype, scales.shape)}
    accepted = quant.formats()["fp8"]().accepts(kinds, {"weight_block_size": [block, block]})
    fits = all(size % block == 0 or size < block for size in (rows, columns))
    assert accepted == fits
    if accepted:
        weight = quant.formats()["fp8"]().weight(
            {"values": values, "scales": scales}, torch.bfloat16
        )
        assert torch.equal(weight, numbers.bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_every_exponent_of_mxfp4_gives_what_transformers_makes(dtype):
    codes = torch.arange(256).view(16, 16).to(torch.uint8)
    blocks = codes.expand(256, 16, 16).contiguous()  # [out, groups, half]
    scales = torch.arange(256)[:, None].expand(256, 16).to(torch.uint8).contiguous()
    theirs = convert_moe_packed_tensors(blocks[None], scales[None], dtype=dtype)[0]
    ours = quant.formats()["mxfp4"]().dense(
        {"0.blocks": blocks, "0.scales": scales}, dtype, transposed=True
    )
    assert torch.equal(ours.view(torch.uint8), theirs.contiguous().view(torch.uint8))


@pytest.mark.parametrize("kind", ["gptq", "gptq-mixed", "gptq-v2", "awq", "fp4"])
@given(st.integers(1, 9), st.integers(1, 6), st.integers(0, 1 << 20))
@settings(max_examples=10, deadline=None)
def test_four_bits_of_any_weight(kind, rows, columns, seed):
    torch.manual_seed(seed)
    of = FORMATS[kind]
    tensors, numbers = of.quantise(torch.randn(8 * rows, 32 * columns))
    format = quant.formats()[of.name]()
    parts = {part: tensors[ending] for part, ending in format.endings.items()}
    kinds = {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in parts.items()}
    assert format.accepts(kinds, {})
    assert format.weight_shape({part: shape for part, (_, shape) in kinds.items()}) == numbers.shape
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(format.weight(parts, dtype), numbers.to(dtype))


def test_last_blocks_may_be_smaller_than_the_others(tmp_path):
    """Of dense weights: transformers alone refuses them, or takes a wrong factor."""
    folder = tmp_path / "ragged"
    published, plain = make("fp8", folder)
    tensors, numbers = tensors_of(published), tensors_of(plain)
    changed = [name for name in numbers if "kv_a_proj" in name or "o_proj" in name]
    assert changed
    settings_ = settings_of(published) | {"weight_block_size": [24, 24]}
    for name in [n for n in tensors if n.endswith("weight_scale_inv")]:
        weight = name.removesuffix("_scale_inv")
        parts, values = fp8(numbers[weight].float(), 24)
        tensors[weight], tensors[name] = parts[".weight"], parts[".weight_scale_inv"]
        numbers[weight] = values.to(numbers[weight].dtype)
    rewrite(published, tensors)
    rewrite(plain, numbers)
    configure(published, quantization_config=settings_)
    pack(published, tmp_path / "store")  # such experts are stored as the model has them
    model = flashmoe.load(tmp_path / "store", memory="1GiB")
    assert torch.equal(run(model, prompt(9))[1], run(eager(plain), prompt(9))[1])
    with pytest.raises(FlashMoEError, match="flashmoe pack"):
        flashmoe.load(published, memory="1GiB")


def test_other_numbers_than_transformers_makes_are_refused(made, monkeypatch):
    published, _, _ = made("mxfp4")
    kind = quant.formats()["mxfp4"]
    weight = kind.weight
    monkeypatch.setattr(kind, "weight", lambda self, parts, dtype: weight(self, parts, dtype) * 2)
    with pytest.raises(FlashMoEError, match="makes other numbers of model"):
        flashmoe.load(published, memory="1GiB")


def test_an_order_of_columns_that_would_be_ignored_is_refused(made, tmp_path):
    published, _, _ = made("compressed")
    shutil.copytree(published, tmp_path / "ordered")
    tensors = tensors_of(published)
    name = next(n for n in tensors if n.endswith("weight_packed"))
    order = name.replace("weight_packed", "weight_g_idx")
    rewrite(tmp_path / "ordered", tensors | {order: torch.zeros(64, dtype=torch.int32)})
    with pytest.raises(FlashMoEError, match="weight_g_idx"):
        flashmoe.load(tmp_path / "ordered", memory="1GiB")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"bits": 8}, r"already quantised \(gptq\)"),
        ({"quant_method": "secret"}, r"already quantised \(secret\)"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, r"quantised \(bitsandbytes\)"),
    ],
)
def test_what_nobody_makes_plain_is_refused(made, tmp_path, changes, complaint):
    published, _, _ = made("gptq")
    shutil.copytree(published, tmp_path / "other")
    configure(tmp_path / "other", quantization_config=settings_of(published) | changes)
    with pytest.raises(FlashMoEError, match=complaint):
        flashmoe.load(tmp_path / "other", memory="1GiB")


def edited(made, kind, folder, edit):
    """A copy of a published checkpoint, whose tensors are what `edit` makes of them."""
    published, _, _ = made(kind)
    shutil.copytree(published, folder)
    rewrite(folder, edit(tensors_of(published)))
    return folder


def without(ending, part="experts"):
    def edit(tensors):
        gone = next(name for name in tensors if name.endswith(ending) and part in name)
        return {name: tensor for name, tensor in tensors.items() if name != gone}

    return edit


def renamed_scales(tensors):
    return {name.replace("weight_scale_inv", "weight_scale"): t for name, t in tensors.items()}


def other_dtype(tensors):
    name = next(name for name in tensors if name.endswith("weight_scale_inv") and "experts" in name)
    return tensors | {name: tensors[name].half()}


def zeros(tensors):
    name = next(name for name in tensors if name.endswith("g_idx") and "experts" in name)
    return tensors | {name: torch.zeros_like(tensors[name])}


def beyond(tensors):
    name = next(name for name in tensors if name.endswith("g_idx") and "experts" in name)
    return tensors | {name: tensors[name] + 100}


@pytest.mark.parametrize(
    ("kind", "edit", "complaint"),
    [
        ("gptq", without("qzeros"), "7 tensors such as .*qzeros"),
        ("gptq", without("qzeros", "self_attn"), "parts are missing"),
        ("gptq", zeros, "all inputs into one group"),
        ("gptq", beyond, "groups that a weight does not have"),
        ("mxfp4", without("_scales"), "gate_up_proj|down_proj"),
        ("fp8", without("weight_scale_inv"), "no scales beside it"),
        ("fp8", without("weight_scale_inv", "self_attn"), "no scales beside it"),
        ("fp8", renamed_scales, "no scales beside it"),
    ],
)
def test_what_is_not_whole_is_refused(made, tmp_path, kind, edit, complaint):
    folder = edited(made, kind, tmp_path / "edited", edit)
    for use in (lambda: flashmoe.load(folder, memory="1GiB"), lambda: pack(folder, tmp_path / "s")):
        with pytest.raises(FlashMoEError, match=complaint):
            use()


def test_a_layer_may_be_plain_beside_others(made, tmp_path):
    _, plain, _ = made("fp8")
    numbers = tensors_of(plain)

    def with_a_plain_layer(tensors):
        ours = [name for name in tensors if ".layers.1.mlp.experts." in name]
        kept = {name: tensor for name, tensor in tensors.items() if name not in ours}
        return kept | {name: numbers[name] for name in ours if name in numbers}

    folder = edited(made, "fp8", tmp_path / "edited", with_a_plain_layer)
    pack(folder, tmp_path / "store")
    expected = run(eager(plain), prompt(9))[1]
    for path in (folder, tmp_path / "store"):
        model = flashmoe.load(path, memory="1GiB")
        assert torch.equal(run(model, prompt(9))[1], expected)
        model.flashmoe.close()
    with Checkpoint(folder) as source:
        in_parts = source.published.kinds
    assert any("layers.2" in name for name in in_parts)
    assert not any("layers.1" in name for name in in_parts)


def test_experts_that_differ_in_dtype_are_packed_plain(made, tmp_path):
    folder = edited(made, "fp8", tmp_path / "edited", other_dtype)
    pack(folder, tmp_path / "store")
    with Checkpoint(folder) as source:
        differing = [n for n in source.expert_parameter_names if n not in source.published.kinds]
    assert len(differing) == 1
    with pytest.raises(FlashMoEError, match="flashmoe pack"):
        flashmoe.load(folder, memory="1GiB")


@pytest.mark.parametrize("kind", ["mxfp4", "fp8", "gptq", "awq"])
@pytest.mark.parametrize("damage", ["name", "dtype", "shape", "number", "gone"])
def test_a_store_of_other_parts_is_refused(made, tmp_path, kind, damage):
    """Its checksums may be right: machine code must not multiply by what does not fit."""
    store = tmp_path / "store"
    shutil.copytree(made(kind)[2], store)
    path = store / manifests.FILE_NAME
    document = json.loads(path.read_text())
    for layer in document["layers"]:
        parts = [tensor for tensor in layer["tensors"] if tensor["name"].startswith("down_proj/")]
        last = parts[-1]
        match damage:
            case "name":
                last["name"] = "down_proj/0.other"
            case "dtype":  # of the same size
                same = {"uint8": "int8", "float32": "int32", "float16": "bfloat16"}
                last["dtype"] = same.get(last["dtype"], "float32")
                if kind in ("gptq", "awq") and last["dtype"] == "bfloat16":
                    parts[0]["dtype"] = "float32"
            case "shape":
                last["shape"] = [*last["shape"][:-1], last["shape"][-1] + 1]
            case "number":
                last["name"] = last["name"].replace("/0.", "/")
            case "gone":
                layer["tensors"].remove(last)
    path.write_text(json.dumps(document))
    with pytest.raises(FlashMoEError, match="pack it again"):
        flashmoe.load(store, memory="1GiB", arithmetic="fast")


def test_the_model_is_no_longer_called_quantised(made):
    published, _, store = made("fp8")
    for path in (published, store):
        model = flashmoe.load(path, memory="1GiB")
        assert getattr(model.config, "quantization_config", None) is None
        model.flashmoe.close()
    with Checkpoint(published, dequantise=True) as source:
        assert source.description.quantisation == quant.NONE


@EACH
def test_fast_arithmetic_gives_the_same_bits_at_every_budget(made, kind, monkeypatch):
    published, plain, store = made(kind)
    format = quant.formats()[FORMATS[kind].name]
    few, asked = format.weight_products, []

    def counted(self, x, many):
        if (product := few(self, x, many)) is not None:
            asked.append(x.shape[1])
        return product

    monkeypatch.setattr(format, "weight_products", counted)
    with closing(backends.open_path(store)) as backend:
        least = budget.least_bytes(backend.manifest)
    ids, given = prompt(9), []
    for path, memory, ahead in (
        (published, least, True), (store, least, False), (store, "1GiB", True)
    ):  # fmt: skip
        model = flashmoe.load(path, memory=memory, arithmetic="fast", prefetch=ahead)
        assert model.flashmoe.stats()["arithmetic"] == "fast"
        given.append(run(model, ids)[1])
        model.flashmoe.close()
    assert torch.equal(given[0], given[1])
    assert torch.equal(given[0], given[2])
    exact = run(eager(plain), ids)[1]
    assert (given[0][0] - exact[0]).abs().max() < 0.05 * exact[0].abs().max()
    assert set(asked) >= {1}
    assert max(asked) <= FEW


@EACH
def test_fast_products_are_no_less_accurate(kind):
    if kind == "compressed":
        pytest.importorskip("compressed_tensors")
    torch.manual_seed(3)
    of = FORMATS[kind]
    format = quant.formats()[of.name]()
    if of.quantise is None:
        tensors, _ = mxfp4(torch.zeros(1, 64, 512))
        tensors = {ending: tensor[0] for ending, tensor in tensors.items()}
    else:
        tensors, _ = of.quantise(torch.randn(512, 64))
    parts = {f"0.{part}": tensors[ending] for part, ending in format.endings.items()}
    x = torch.randn(5, 64).bfloat16()
    scales = {name: t.float() if t.dtype == torch.bfloat16 else t for name, t in parts.items()}
    weight = format.dense(scales, torch.float32, transposed=False).double()  # nothing is rounded
    true = x.double() @ weight.T
    exact = x @ format.dense(parts, torch.bfloat16, transposed=False).T
    fast = format.products(x[None], [parts])[0]
    error, allowed = (fast.bfloat16() - true).abs().mean(), (exact - true).abs().mean()
    assert error <= 1.05 * allowed


def test_gradients_are_exact_all_the_same(made):
    published, _, _ = made("fp8")
    hidden = []
    for arithmetic in ("exact", "fast"):
        model = flashmoe.load(published, memory="1GiB", arithmetic=arithmetic)
        states = model.get_input_embeddings()(prompt(5)).detach().requires_grad_()
        model(inputs_embeds=states).logits.float().sum().backward()
        hidden.append(states.grad)
        model.flashmoe.close()
    assert torch.equal(*hidden)


def test_an_unknown_arithmetic_is_refused(made):
    with pytest.raises(FlashMoEError, match="choose from exact, fast"):
        flashmoe.load(made("fp8")[0], memory="1GiB", arithmetic="quick")
