"""Experts read in place from a checkpoint: the same bytes, the same output, no second copy."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, budget, generate, prompt

import flashmoe
from flashmoe.disk import direct_io
from flashmoe.disk.direct_io import aligned_memory
from flashmoe.engines.transformers.checkpoints import backends
from flashmoe.engines.transformers.checkpoints.backends.in_place import InPlace
from flashmoe.engines.transformers.checkpoints.backends.packed import PackedModel
from flashmoe.errors import FlashMoEError
from harness import tiny_models
from harness.runs.page_cache import cached_bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_output_is_that_of_the_packed_store(checkpoints, stores, reading, family):
    ids, memory = prompt(17), budget(stores(family), 3)
    texts = []
    for path in (checkpoints(family), stores(family)):
        model = flashmoe.load(path, memory=memory, policy="lru")
        texts.append(generate(model, ids, 8))
        model.flashmoe.close()
    assert texts[0] == texts[1]


@pytest.fixture(scope="module")
def both(checkpoints, stores):
    pair = InPlace(checkpoints("qwen3_moe")), PackedModel(stores("qwen3_moe"))
    yield pair
    for backend in pair:
        backend.close()


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_part_of_an_expert_is_the_packed_one(both, data):
    _, packed = both
    layer = data.draw(st.integers(0, len(packed.manifest.layers) - 1))
    spec = packed.manifest.layers[layer]
    expert = data.draw(st.integers(0, spec.n_experts - 1))
    page = direct_io.ALIGNMENT_BYTES
    pages = spec.extent_bytes // page
    first = data.draw(st.integers(0, pages - 1))
    last = data.draw(st.integers(first + 1, pages))
    given = []
    for backend in both:
        memory = memoryview(aligned_memory((last - first) * page))[: (last - first) * page]
        backend.read(layer, expert, first * page, memory)
        given.append(bytes(memory))
    assert given[0] == given[1]


def test_reads_leave_nothing_in_the_page_cache(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints(), tmp_path / "checkpoint")
    os.sync()  # pages that are not written yet cannot be dropped
    model = flashmoe.load(folder, memory="1MiB", policy="lru")
    generate(model, prompt(9), 4)
    if not model.flashmoe.stats()["direct_io"]:
        pytest.skip("this file system refuses direct reads")
    assert sum(cached_bytes(file) for file in folder.glob("*.safetensors")) == 0
    model.flashmoe.close()


def test_a_shard_replaced_while_open_changes_nothing(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints(), tmp_path / "checkpoint")
    model = flashmoe.load(folder, memory="1MiB", policy="lru")
    expected = generate(model, prompt(9), 6)
    model.flashmoe.reset()
    for file in folder.glob("*.safetensors"):
        other = tmp_path / "other"
        other.write_bytes(bytes(file.stat().st_size))
        other.replace(file)
    assert generate(model, prompt(9), 6) == expected
    model.flashmoe.close()


def test_a_shard_cut_short_while_open_names_the_expert(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints(), tmp_path / "checkpoint")
    model = flashmoe.load(folder, memory="1MiB", policy="lru")
    for file in folder.glob("*.safetensors"):
        os.truncate(file, 4096)
    with pytest.raises(FlashMoEError, match=r"expert \d of .* cut short; fetch the checkpoint"):
        generate(model, prompt(9), 6)
    model.flashmoe.close()


def test_a_layout_that_must_be_converted_is_refused_in_a_sentence(tmp_path):
    """The hub's checkpoints of qwen3_vl_moe have the experts' weights turned round."""
    tiny_models.make("qwen3_vl_moe").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {
        name: tensor.transpose(1, 2).contiguous() if ".experts." in name else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(FlashMoEError, match=r"converted when it is loaded.*flashmoe pack"):
        flashmoe.load(tmp_path, memory="1GiB")


def test_a_directory_that_is_neither_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(FlashMoEError, match=r"no config\.json and no manifest"):
        backends.open_path(tmp_path)
    with pytest.raises(FlashMoEError, match="no such directory"):
        backends.open_path(tmp_path / "none")


@torch.inference_mode()
def test_closing_closes_the_shards(checkpoints):
    before = len(list(Path("/proc/self/fd").iterdir()))
    model = flashmoe.load(checkpoints(), memory="1MiB", policy="lru")
    model(prompt(3))
    model.flashmoe.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
