"""The command `synth`: random models of published shapes, as checkpoints and as stores."""

from __future__ import annotations

import shutil
import sys

import gguf
import gguf_models
import numpy as np
import pytest
import torch
from command_line import refused, run

import flashmoe
from flashmoe.engines.llama.files import quantisation, writer
from flashmoe.engines.transformers.checkpoints import named_models
from flashmoe.engines.transformers.checkpoints.random_weights import RandomWeights
from flashmoe.errors import FlashMoEError

SMALL = {
    "vocab_size": 320, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_experts": 8, "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip


def test_a_synthetic_store_needs_no_checkpoint(capfd, tmp_path, monkeypatch):
    small = {
        "vocab_size": 128, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_experts": 8, "num_experts_per_tok": 2,
    }  # fmt: skip
    monkeypatch.setitem(named_models.MODELS, "tiny", named_models.MODELS["olmoe-1b-7b"] | small)
    status, _, _ = run(capfd, "synth", "tiny", tmp_path / "store", "--store")
    assert status == 0
    assert run(capfd, "verify", tmp_path / "store")[0] == 0
    model = flashmoe.load(tmp_path / "store", memory="1MiB")
    assert model(torch.arange(4)[None]).logits.isfinite().all()
    model.flashmoe.close()
    assert "not empty" in refused(capfd, "synth", "tiny", tmp_path / "store", "--store")
    assert named_models.total_bytes("tiny") == sum(p.numel() for p in model.parameters()) * 2


@pytest.mark.parametrize("name", sorted(named_models.MODELS))
def test_the_named_models_have_their_published_size(name):
    """Billions of parameters, as their cards say."""
    published = {
        "olmoe-1b-7b": 6.9, "deepseek-v2-lite": 15.7, "gpt-oss-20b": 20.9,
        "qwen3-30b-a3b": 30.5, "mixtral-8x7b": 46.7,
    }  # fmt: skip
    if name in published:
        assert named_models.total_bytes(name) / 2e9 == pytest.approx(published[name], rel=0.01)


@pytest.mark.parametrize(
    ("name", "quantise", "gigabytes"),
    [
        ("olmoe-1b-7b", "q4_k_m", 4.21), ("qwen3-30b-a3b", "q4_k_m", 18.6),
        ("deepseek-v2-lite", "q4_k_m", 10.4), ("mixtral-8x7b", "q4_k_m", 28.4),
        ("gpt-oss-20b", "mxfp4_moe", 12.1),
    ],
)  # fmt: skip
def test_the_named_models_have_the_size_of_published_gguf_files(name, quantise, gigabytes):
    source = RandomWeights(named_models.config_of(name), 0)
    plan = writer.plan(source, quantise)
    total = sum(planned.size_bytes for planned in plan.values())
    assert total / 1e9 == pytest.approx(gigabytes, rel=0.01)


def test_a_full_disk_while_synthesising_is_one_sentence(capfd, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    assert "1.0 MiB free" in refused(capfd, "synth", "olmoe-1b-7b", tmp_path / "s")
    assert not list(tmp_path.iterdir())


def test_synthesising_removes_nothing_that_it_did_not_make(capfd, tmp_path, monkeypatch):
    small = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    monkeypatch.setitem(named_models.MODELS, "tiny", named_models.MODELS["olmoe-1b-7b"] | small)
    (tmp_path / "s.partial").mkdir()
    (tmp_path / "s.partial" / "mine").touch()
    assert run(capfd, "synth", "tiny", tmp_path / "s")[0] == 0
    assert (tmp_path / "s.partial" / "mine").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s", "s.partial"]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(named_models.MODELS, "small", named_models.MODELS["olmoe-1b-7b"] | SMALL)


def types(path) -> dict[str, str]:
    """Of a GGUF file's tensors, by name."""
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def test_a_gguf_file_has_the_types_that_llama_quantize_gives(capfd, tmp_path, small):
    status, out, _ = run(capfd, "synth", "small", tmp_path / "m.gguf", "--quant", "q4_k_m")
    assert (status, out) == (0, f"{tmp_path / 'm.gguf'}: small, random weights, q4_k_m\n")
    found = types(tmp_path / "m.gguf")
    assert found["blk.0.ffn_down_exps.weight"] == "Q4_K"  # as `--pure` would give to all
    assert found["blk.1.ffn_down_exps.weight"] == found["output.weight"] == "Q6_K"
    assert found["blk.1.ffn_up_exps.weight"] == found["token_embd.weight"] == "Q4_K"
    assert found["blk.0.attn_v.weight"] == found["blk.1.attn_k.weight"] == "Q8_0"  # eight experts
    assert found["blk.0.attn_output.weight"] == "Q5_K"
    assert found["blk.0.attn_q.weight"] == "Q4_K"
    assert found["blk.0.ffn_gate_inp.weight"] == found["blk.0.attn_norm.weight"] == "F32"
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    assert "is there already" in refused(capfd, "synth", "small", tmp_path / "m.gguf")


def test_a_gguf_file_of_floats_has_the_dtype_of_the_model(capfd, tmp_path, small):
    assert run(capfd, "synth", "small", tmp_path / "m.gguf", "--dtype", "fp16")[0] == 0
    assert set(types(tmp_path / "m.gguf").values()) == {"F16", "F32"}


def test_a_split_gguf_file_is_in_parts(capfd, tmp_path, small):
    path = tmp_path / "[m].gguf"
    options = ("--quant", "q4_0,q8_0", "--split", "1MiB")
    assert run(capfd, "synth", "small", path, *options)[0] == 0
    parts = sorted(tmp_path.iterdir())
    assert [part.name for part in parts] == [
        f"[m]-{number:05}-of-{len(parts):05}.gguf" for number in range(1, len(parts) + 1)
    ]
    assert len(parts) > 1
    assert all(part.stat().st_size < 1.1 * 2**20 for part in parts)
    assert f"{parts[0]} is there already" in refused(capfd, "synth", "small", path)


def test_a_gguf_file_that_cannot_be_written_is_one_sentence(capfd, tmp_path, small, monkeypatch):
    path = tmp_path / "m.gguf"
    assert "no GGUF quantisation" in refused(capfd, "synth", "small", path, "--quant", "q7_x")
    assert "--store makes" in refused(capfd, "synth", "small", path, "--store")
    assert "end the path with .gguf" in refused(capfd, "synth", "small", tmp_path, "--split", "1G")
    assert "no fused gate" in refused(capfd, "synth", "small", path, "--fuse")
    monkeypatch.setattr(quantisation, "_quantise_chunk", lambda: None)
    assert "pip install xllamacpp" in refused(capfd, "synth", "small", path, "--quant", "q4_k")
    monkeypatch.undo()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setitem(named_models.MODELS, "small", named_models.MODELS["olmoe-1b-7b"] | SMALL)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    assert "1.0 MiB free" in refused(capfd, "synth", "small", path)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "flashmoe.engines.llama.files.writer")
    monkeypatch.delattr("flashmoe.engines.llama.files.writer")
    assert "gguf is not installed: pip" in refused(capfd, "synth", "olmoe-quarter", path)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing_of_a_gguf_file(tmp_path, monkeypatch):
    def fail(descriptor, data, offset):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", fail)
    with pytest.raises(FlashMoEError, match=r"writing stopped \(No space left"):
        writer.write(gguf_models.weights("olmoe"), tmp_path / "m.gguf", "q8_0")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", quantisation.KINDS)
def test_values_come_back_from_every_type(name, monkeypatch):
    """As gguf-py reads them, and as it writes them where it can."""
    kind = quantisation.KINDS[name]
    values = torch.empty(4, 512).uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    raw = quantisation.encode(values, kind)
    assert len(raw) == quantisation.size_bytes((4, 512), kind)
    stored = {"f32": np.float32, "f16": np.float16}.get(name, np.uint8)
    back = gguf.quants.dequantize(raw.view(stored).reshape(4, -1), kind)
    precision = {"f32": 23, "f16": 10, "bf16": 7}.get(name, 8 * len(raw) / values.numel() - 1)
    assert np.abs(back - values.numpy()).max() > 0 or name == "f32"
    assert np.sqrt(np.square(back - values.numpy()).mean()) < 2.0**-precision
    monkeypatch.setattr(quantisation, "_quantise_chunk", lambda: None)
    if kind not in quantisation._BY_GGML:
        assert quantisation.encode(values, kind).tobytes() == raw.tobytes()


def test_progress_is_told_in_bytes_of_the_file(tmp_path):
    told = []
    (path,) = writer.write(
        gguf_models.weights("gpt_oss"), tmp_path / "m.gguf", "mxfp4_moe",
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] == sum(t.n_bytes for t in gguf.GGUFReader(path).tensors)
