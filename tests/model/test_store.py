"""Packing and reading: what comes out is what transformers loads, or a sentence says why not."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import FAMILIES

from flashmoe.disk import direct_io
from flashmoe.engines.transformers.checkpoints.backends.packed import PackedModel
from flashmoe.engines.transformers.checkpoints.checkpoint import Checkpoint
from flashmoe.engines.transformers.checkpoints.pack import pack
from flashmoe.engines.transformers.model import empty_model
from flashmoe.errors import FlashMoEError
from flashmoe.memory.host_arena import HostArena
from flashmoe.reading.reader import ExtentReader
from flashmoe.reading.verify import verify
from flashmoe.store import manifest
from harness.runs.page_cache import cached_bytes


def read_all(store: Path) -> dict[str, torch.Tensor]:
    """Every expert parameter, read through reader and arena, stacked as the module has it."""
    contents = manifest.load(store)
    reader = ExtentReader(PackedModel(store))
    result = {}
    for number, layer in enumerate(contents.layers):
        arena = HostArena(layer, layer.n_experts)
        for read in reader.submit(number, list(enumerate(arena.slots))):
            read.result()
        for spec in layer.tensors:
            stacked = torch.stack([slot[spec.name] for slot in arena.parameters]).clone()
            result[f"{layer.module}.{spec.name}"] = stacked
        arena.close()
    reader.close()
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_a_store_holds_what_transformers_loads(family, checkpoints, stores):
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoints(family))
    state = model.state_dict()
    experts = read_all(stores(family))
    for name, tensor in experts.items():
        assert torch.equal(tensor, state[name]), name
    contents = verify(stores(family)).manifest
    dense = load_file(stores(family) / contents.dense_file)
    missing = set(state) - set(experts) - set(dense) - set(model.all_tied_weights_keys)
    assert not missing
    assert all(torch.equal(dense[name], state[name]) for name in dense)
    assert len(list(checkpoints(family).glob("*.safetensors"))) > 1  # several shards were read


def test_fused_tensors_on_disk_pack_to_the_same_store(checkpoints, stores, tmp_path):
    """A checkpoint in the module's own layout (experts as one tensor), as `synth` writes it."""
    with Checkpoint(checkpoints()) as source:
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoints())
        fused = tmp_path / "fused"
        fused.mkdir()
        shutil.copy(checkpoints() / "config.json", fused)
        save_file(
            {k: v.contiguous() for k, v in model.state_dict().items()}, fused / "model.safetensors"
        )
        assert set(source.expert_parameter_names) <= set(model.state_dict())
    made = pack(fused, tmp_path / "store")
    assert made.layers == manifest.load(stores()).layers


@given(
    shapes=st.lists(st.lists(st.integers(1, 70), min_size=1, max_size=3), min_size=1, max_size=5),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    n_experts=st.integers(1, 5),
)
def test_extents_never_overlap_and_are_aligned(shapes, dtype, n_experts):
    tensors = [(f"t{i}", dtype, tuple(shape)) for i, shape in enumerate(shapes)]
    layer = manifest.lay_out("m", n_experts, 8192, tensors)
    end = 0
    for spec in layer.tensors:
        assert spec.offset_bytes % manifest.TENSOR_ALIGNMENT_BYTES == 0
        assert spec.offset_bytes >= end
        end = spec.offset_bytes + spec.size_bytes
    assert end <= layer.extent_bytes < end + direct_io.ALIGNMENT_BYTES
    for expert in range(n_experts):
        assert layer.extent_offset(expert) % direct_io.ALIGNMENT_BYTES == 0


def test_reading_leaves_nothing_in_the_page_cache(own_store, reading):
    path = own_store / manifest.load(own_store).experts_file
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        direct_io.drop_page_cache(file.fileno())
    read_all(own_store)
    assert cached_bytes(path) == 0


def test_buffered_where_direct_is_refused_with_a_warning(own_store, monkeypatch, caplog, reading):
    expected = read_all(own_store)
    real = os.open

    def refusing(path, flags, *rest, **more):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refusing)
    with caplog.at_level(logging.WARNING):
        again = read_all(own_store)
    assert "refuses direct I/O" in caplog.text
    assert all(torch.equal(expected[name], again[name]) for name in expected)
    monkeypatch.undo()
    assert cached_bytes(own_store / manifest.load(own_store).experts_file) == 0


def flip_byte(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_a_flipped_byte_names_layer_and_expert(own_store, reading):
    contents = manifest.load(own_store)
    layer = contents.layers[1]
    flip_byte(own_store / contents.experts_file, layer.extent_offset(5) + 77)
    for check in (verify, read_all):
        with pytest.raises(FlashMoEError, match=rf"expert 5 of {layer.module}.*not those"):
            check(own_store)


def cut_experts(store):
    os.truncate(store / manifest.load(store).experts_file, 5000)


def cut_dense(store):
    os.truncate(store / manifest.load(store).dense_file, 500)


def edit_manifest(**changes):
    def damage(store):
        path = store / manifest.FILE_NAME
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def overlap(store):
    path = store / manifest.FILE_NAME
    document = json.loads(path.read_text())
    document["layers"][1]["offset_bytes"] = 0
    path.write_text(json.dumps(document))


def other_config(store):
    path = store / "config.json"
    path.write_text(path.read_text().replace('"vocab_size": 128', '"vocab_size": 129'))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (cut_experts, "cut short"),
        (cut_dense, "cut short"),
        (lambda store: (store / manifest.FILE_NAME).unlink(), "is not a store"),
        (lambda store: (store / manifest.FILE_NAME).write_text("{"), "cannot be read"),
        (lambda store: (store / manifest.FILE_NAME).write_text("[" * 99999), "cannot be read"),
        (edit_manifest(format="other"), "not a FlashMoE manifest"),
        (edit_manifest(version=99), "format version 99"),
        (edit_manifest(experts_file="../../etc/passwd"), "outside the store"),
        (edit_manifest(layers=[]), "damaged"),
        (edit_manifest(surprise=1), "damaged"),
        (overlap, "damaged"),
        (other_config, "another model"),
    ],
)
def test_a_damaged_store_is_refused(own_store, damage, complaint):
    damage(own_store)
    with pytest.raises(FlashMoEError, match=complaint):
        verify(own_store)


def no_shard(folder):
    sorted(folder.glob("*.safetensors"))[1].unlink()


def cut_shard(folder):
    shard = sorted(folder.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 100)


def cut_header(folder):
    os.truncate(sorted(folder.glob("*.safetensors"))[1], 40)


def no_config(folder):
    (folder / "config.json").unlink()


def said_to_be_quantised(folder, method="fp8"):
    path = folder / "config.json"
    settings = json.loads(path.read_text()) | {"quantization_config": {"quant_method": method}}
    path.write_text(json.dumps(settings))


def quantised(folder):
    said_to_be_quantised(folder, "bitsandbytes")
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard).items()
        save_file({n: t.to(torch.float8_e4m3fn) if t.dim() > 1 else t for n, t in tensors}, shard)


def wider(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 48}))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (no_shard, "is missing"),
        (cut_shard, "cut short"),
        (cut_header, "cut short or damaged"),
        (no_config, "no config.json"),
        (quantised, "already quantised"),
        (said_to_be_quantised, "they are float32: remove that entry"),
        (wider, "do not match|of another model"),
    ],
)
def test_a_bad_checkpoint_leaves_the_previous_store_usable(
    checkpoints, own_store, tmp_path, damage, complaint
):
    before = read_all(own_store)
    bad = tmp_path / "bad"
    shutil.copytree(checkpoints(), bad)
    damage(bad)
    with pytest.raises(FlashMoEError, match=complaint):
        pack(bad, own_store)
    with pytest.raises(FlashMoEError, match=complaint):
        pack(bad, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    verify(own_store)
    after = read_all(own_store)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_skeleton_holds_no_weights(checkpoints):
    model = empty_model.build(empty_model.read_config(checkpoints()))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert all(buffer.is_meta for buffer in model.buffers())
