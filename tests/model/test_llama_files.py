"""GGUF files of every layout that llama.cpp computes: its own tokens, whatever the budget."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import gguf
import gguf_models
import numpy as np
import pytest
import torch
import transformers
from llama_process import run

from flashmoe.engines.llama import expert_tensors
from flashmoe.engines.llama.backend import GGUFExperts
from flashmoe.engines.llama.files import writer
from flashmoe.engines.llama.ggml import GGML
from flashmoe.engines.llama.layout import Layout, least_bytes
from flashmoe.engines.llama.model_file import ModelFile
from flashmoe.errors import FlashMoEError

SHARES = (0.5, 0.65, 2.0)  # of the bytes of the file; most of it is experts
PROMPTS = ["a", "hello world, this is a prompt. " * 3, "x1y2z3 " * 100]
TEXT = "the same in both"
LONG = "a prompt of two thousand tokens; " * 60
# family, quantisation, how it is written; experts whose bytes differ by layer
FILES = {
    "types in turn": ("olmoe", "q4_k,q5_k,q6_k,iq4_nl,q2_k", {}, True),
    "split": ("qwen3_moe", "q4_k_m", dict(split_bytes=1 << 20), True),
    "settings apart": (
        "qwen2_moe", "q3_k,iq4_xs,q5_0,q5_1", dict(split_bytes=2 << 20, first_part_empty=True),
        True,
    ),
    "biases, sinks, MXFP4": ("gpt_oss", "mxfp4_moe", {}, False),
    "gate and up fused": ("deepseek_v2", "q8_0,q4_0", dict(fuse=True), True),
    "groups of experts": ("deepseek_v3", "q5_k_m", {}, True),
    "floats in turn": ("mixtral", "f32,f16,bf16", {}, False),
    "float32": ("granitemoe", "f32", {}, False),
}  # fmt: skip


@pytest.mark.parametrize("layout", FILES)
def test_tokens_and_probabilities_are_llama_cpps_own(tmp_path, layout):
    """At three budgets, to which the running model is set one after the other."""
    family, quantise, options, mixed = FILES[layout]
    source = gguf_models.weights(family)
    parts = writer.write(source, tmp_path / "model.gguf", quantise, **options)
    size = sum(part.stat().st_size for part in parts)
    prompts = [*PROMPTS, LONG] if layout == "split" else PROMPTS
    policy = "learned" if layout == "split" else "lru"
    budgets = [int(size * share) for share in SHARES]
    found = run(
        "llama_budgets.py", model=str(parts[0]), prompts=prompts, policy=policy,
        budgets=[str(budget) for budget in budgets],
    )  # fmt: skip
    assert [len(answer["tokens"]) for answer in found["plain"]] == [12] * len(prompts)
    for one, budget in zip(found["rounds"], budgets, strict=True):
        assert one["answers"] == found["plain"]
        assert one["rss_bytes"] <= found["dense_bytes"] + budget
    slots = [one["stats"]["slots_per_layer"] for one in found["rounds"]]
    count = source.description.layers[0].n_experts
    assert 0 < slots[0] < slots[1] < slots[2] == count
    assert found["rounds"][0]["stats"]["misses"] > 0
    assert [layer[0] for layer in found["layers"]] == [count] * len(source.description.layers)
    assert (len({layer[1] for layer in found["layers"]}) > 1) == mixed
    assert found["top_k"] == gguf_models.TOP_K


@pytest.fixture(scope="module")
def answers_of_float32(tmp_path_factory):
    """What llama.cpp answers with float32 weights, by family."""
    folder = tmp_path_factory.mktemp("float32")
    models = {}
    for family in gguf_models.FAMILIES:
        (models[family],) = writer.write(
            gguf_models.weights(family, num_hidden_layers=2), folder / f"{family}.gguf", "f32"
        )
    answers = run("llama_plain.py", models=[str(path) for path in models.values()], prompts=[TEXT])
    return {family: answers[str(path)][0] for family, path in models.items()}


@pytest.mark.parametrize("family", gguf_models.FAMILIES)
def test_a_file_computes_what_transformers_computes(answers_of_float32, family):
    """Of the same weights: that their layout is right is more than that llama.cpp loads them."""
    source = gguf_models.weights(family, num_hidden_layers=2)
    state = dict(source.dense())
    for layer in source.description.layers:
        experts = [source.expert(layer.module, number) for number in range(layer.n_experts)]
        for name in experts[0]:
            state[f"{layer.module}.{name}"] = torch.stack([one[name] for one in experts])
    model = transformers.AutoModelForCausalLM.from_config(source.config).eval()
    model.load_state_dict(state)
    answer = answers_of_float32[family]
    tokens = [*TEXT.encode(), *answer["tokens"][:-1]]
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, len(TEXT) - 1 :]
    differences = [
        abs(ours[token].item() - log_probability)
        for ours, rivals in zip(logits.log_softmax(-1), answer["rivals"], strict=True)
        for token, log_probability in rivals
    ]
    # a near tie between two experts may turn out otherwise, a wrong layout changes every token
    assert np.median(differences) < 0.005


@pytest.fixture(scope="module")
def ggml():
    """The reader of GGUF files in the xllamacpp wheel."""
    spec = importlib.util.find_spec("xllamacpp")
    return GGML(str(next(Path(spec.origin).parent.glob("xllamacpp*.so"))))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "model.gguf"
    return writer.write(gguf_models.weights("olmoe", num_hidden_layers=2), path, "q4_0")[0]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    path = tmp_path_factory.mktemp("parts") / "model.gguf"
    source = gguf_models.weights("olmoe", num_hidden_layers=2)
    return writer.write(source, path, "q4_0", split_bytes=1 << 20)


def test_the_parts_of_a_split_file_are_found(ggml, parts, file):
    assert len(parts) > 2
    assert expert_tensors.parts_of(ggml, parts[0]) == parts
    assert expert_tensors.parts_of(ggml, file) == [file]
    found = [expert_tensors.contents_of(ggml, part) for part in parts]
    whole = expert_tensors.contents_of(ggml, file)
    assert [one.part for one in found] == list(range(len(parts)))
    names = [tensor.name for one in found for tensor in one.tensors]
    assert names == [tensor.name for tensor in whole.tensors]
    assert whole.top_k == gguf_models.TOP_K


@pytest.mark.parametrize("layout", ["one file", "parts"])
def test_a_budget_below_the_least_is_refused_before_the_model_is_loaded(ggml, file, parts, layout):
    """By a byte: pages that experts share with their neighbours count too."""
    paths = parts if layout == "parts" else [file]
    found = Layout(paths[0], [expert_tensors.contents_of(ggml, path) for path in paths])
    least = least_bytes(found.manifest, found.edge_bytes)
    assert found.edge_bytes > 0
    job = dict(model=str(paths[0]), prompts=["abc"])
    said = run("llama_server.py", memory=str(least - 1), **job)["refused"]
    assert f"memory={least - 1} is too small" in said and f"({least} bytes) at least" in said
    (answer,) = run("llama_server.py", memory=str(least), **job)["answers"]
    assert len(answer["tokens"]) == 12


def test_a_missing_part_is_one_sentence(ggml, parts, tmp_path):
    for part in parts:
        shutil.copy(part, tmp_path)
    missing = tmp_path / parts[1].name
    missing.unlink()
    with pytest.raises(FlashMoEError, match=f"{missing} is missing"):
        expert_tensors.parts_of(ggml, tmp_path / parts[0].name)
    with pytest.raises(FlashMoEError, match=r"is part 3 of a model in .* files: name"):
        expert_tensors.parts_of(ggml, tmp_path / parts[2].name)
    renamed = (tmp_path / parts[0].name).rename(tmp_path / "renamed.gguf")
    with pytest.raises(FlashMoEError, match="name the first"):
        expert_tensors.parts_of(ggml, renamed)


@pytest.mark.parametrize("content", ["", "text", "head", "damaged", "directory", "none"])
def test_a_file_that_llama_cpp_does_not_read_is_one_sentence(ggml, file, tmp_path, content):
    path, head = tmp_path / "bad.gguf", file.read_bytes()[:5000]
    if content == "directory":
        path.mkdir()
    elif content != "none":
        damaged = head[:16] + b"\xff" * 8 + head[24:]
        path.write_bytes(
            {"": b"", "text": b"no such thing" * 9, "head": head, "damaged": damaged}[content]
        )
    with pytest.raises(FlashMoEError, match=r"bad.gguf (is no GGUF file|cannot be read)"):
        expert_tensors.parts_of(ggml, path)


def write_gguf(path, architecture, tensors, **settings):
    """A file of zeros that our writer would not write; tensors: shapes by name."""
    made = gguf.GGUFWriter(path, architecture)
    add = {
        int: made.add_uint32, float: made.add_float32, str: made.add_string, list: made.add_array,
    }  # fmt: skip
    for key, value in settings.items():
        add[type(value)](key.replace("__", "."), value)
    for name, shape in tensors.items():
        made.add_tensor(name, np.zeros(shape, np.float32))
    made.write_header_to_file()
    made.write_kv_data_to_file()
    made.write_tensors_to_file()
    made.close()


def test_settings_may_have_any_type(ggml, tmp_path):
    """The reader ends the process where it is asked for another type than the file has."""

    def contents(**settings):
        path = tmp_path / "a.gguf"
        write_gguf(path, "olmoe", {"blk.7.ffn_up_exps.weight": (6, 4, 32)}, **settings)
        return expert_tensors.contents_of(ggml, path)

    layers = contents(olmoe__expert_used_count=[2, 8, 4])
    assert layers.top_k == 8
    assert (layers.tensors[0].layer, layers.tensors[0].n_experts) == (7, 6)
    assert contents(olmoe__expert_used_count="many", split__count=0.5).top_k == 0
    assert contents(olmoe__expert_used_count=["a", "b"], split__count=[2]).parts == 2
    assert contents(general__architecture=5, olmoe__expert_used_count=3).top_k == 0


def test_an_unknown_layout_is_one_sentence(ggml, tmp_path):
    path = tmp_path / "a.gguf"
    write_gguf(path, "olmoe", {"blk.7.ffn_up_exps.weight": (2, 6, 4, 32)})
    with pytest.raises(FlashMoEError, match=r"ffn_up_exps.weight cannot be divided"):
        expert_tensors.contents_of(ggml, path)
    shapes = {"gate": (6, 4, 32), "up": (6, 4, 32), "down": (7, 32, 32)}
    for kinds in ("gate up", "gate up down"):  # the first without down, the second with one more
        tensors = {f"blk.7.ffn_{kind}_exps.weight": shapes[kind] for kind in kinds.split()}
        write_gguf(path, "olmoe", tensors)
        contents = expert_tensors.contents_of(ggml, path)
        model_file = ModelFile(path, contents.tensors)
        with pytest.raises(FlashMoEError, match="experts of layer 7 are not laid out"):
            GGUFExperts([(model_file, contents)])
        model_file.close()


def test_a_damaged_head_is_read_or_refused(ggml, file, tmp_path):
    """Whatever is wrong in it, the process goes on, and every expert lies within its tensor."""
    head, random = bytearray(file.read_bytes()[:200_000]), np.random.default_rng(0)
    bad, read = tmp_path / "bad.gguf", 0
    start = head.index(b"blk.0")
    for round_number in range(300):
        copy = bytearray(head)
        for _ in range(random.integers(1, 4)):
            at = random.integers(0, start + 1500) if round_number % 2 else random.integers(4, 400)
            copy[at] = random.choice([0, 1, 8, 9, 127, 255, random.integers(256)])
        bad.write_bytes(copy)
        try:
            contents = expert_tensors.contents_of(ggml, bad)
        except FlashMoEError:
            continue
        for tensor in contents.tensors if contents else ():
            assert tensor.expert_bytes * tensor.n_experts == tensor.size_bytes > 0
            assert tensor.offset_bytes > 0
        read += contents is not None
    assert 0 < read < 300


def test_what_cannot_be_served_is_one_sentence_and_what_has_no_experts_is_served(tmp_path, file):
    cut, dense = tmp_path / "cut.gguf", tmp_path / "dense.gguf"
    cut.write_bytes(file.read_bytes()[:-1_000_000])
    foreign = tmp_path / "foreign.gguf"
    shapes = {"blk.0.ffn_up_exps.weight": (6, 4, 32), "blk.0.ffn_down_exps.weight": (6, 32, 4)}
    write_gguf(foreign, "no-such-architecture", shapes)
    source = gguf_models.weights("deepseek_v2", first_k_dense_replace=2, num_hidden_layers=2)
    writer.write(source, dense, "q8_0")
    found = run("llama_refusals.py", models=[str(cut), str(foreign), str(dense)], prompt="abc")
    assert "was cut short: fetch it again" in found[str(cut)]["refused"]
    assert f"{foreign} was not loaded" in found[str(foreign)]["refused"]
    assert found[str(dense)]["answer"] == found[str(dense)]["plain"]
    assert len(found[str(dense)]["answer"]["tokens"]) == 12
    assert "has no experts" in found["stderr"]
