"""Weights that route as recorded by themselves, for engines whose routing cannot be forced."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import flashmoe
from flashmoe.engines.transformers.recorder import record
from flashmoe.errors import FlashMoEError
from flashmoe.store.writer import write_store
from flashmoe.trace import Trace
from harness.runs import hub_checkpoint, peers
from harness.runs.job import FIRST_TOKEN, Job
from harness.runs.self_routing_weights import SteeredWeights

TOKENS, PROMPT = 40, 30


_SETTINGS = dict(
    vocab_size=FIRST_TOKEN + TOKENS + 5, hidden_size=64, intermediate_size=32,
    num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2, num_experts_per_tok=2,
    eos_token_id=None, pad_token_id=0, dtype="bfloat16",
)  # fmt: skip


def steer(config):
    every = np.tile(np.arange(8, dtype=np.uint8), (TOKENS, 3, 1))
    chosen = np.random.default_rng(0).permuted(every, axis=2)[..., :2]
    trace = Trace(chosen, np.zeros(TOKENS, np.int32), 8)
    return config, trace, SteeredWeights(config, 0, trace)


@pytest.fixture
def steered():
    return steer(transformers.OlmoeConfig(num_experts=8, **_SETTINGS))


@pytest.fixture
def steered_gpt_oss():
    return steer(transformers.GptOssConfig(num_local_experts=8, head_dim=32, **_SETTINGS))


@pytest.mark.parametrize("made", ["steered", "steered_gpt_oss"])
def test_steered_weights_route_as_recorded_and_count_up(tmp_path, request, made):
    config, trace, weights = request.getfixturevalue(made)
    config.save_pretrained(tmp_path)
    write_store(weights, tmp_path, tmp_path / "store", lambda done, total: None)
    model = flashmoe.load(tmp_path / "store", memory="1GiB", policy="lru")
    ids = torch.arange(PROMPT) + FIRST_TOKEN
    again = record(model, [ids], max_new_tokens=TOKENS - PROMPT)
    expected = trace.experts[: len(again.experts)]
    if made == "steered_gpt_oss":  # so narrow a model turns the hidden state: ranks may swap
        np.testing.assert_array_equal(np.sort(again.experts), np.sort(expected))
    else:
        np.testing.assert_array_equal(again.experts, expected)
    mask = torch.ones_like(ids)[None]
    text = model.generate(ids[None], attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert text[0].tolist() == list(range(FIRST_TOKEN, FIRST_TOKEN + PROMPT + 8))
    model.flashmoe.close()


def test_a_model_laid_out_otherwise_is_refused(steered):
    _, trace, _ = steered
    config = transformers.NemotronHConfig(num_hidden_layers=1, hidden_size=64)
    with pytest.raises(FlashMoEError, match="cannot be steered"):
        SteeredWeights(config, 0, trace)


def test_a_peer_is_a_file_and_runs_where_its_library_is(monkeypatch):
    peer = peers.available()["llama-cpp"]
    assert peer.command == [sys.executable, "-m", "harness.runs.peers.llama_cpp"]
    monkeypatch.setenv("FLASHMOE_PYTHON_LLAMA_CPP", "/another/python")
    assert peer.command[0] == "/another/python"
    monkeypatch.setenv("FLASHMOE_PYTHON_AIRLLM", shutil.which("false"))
    assert not peers.available()["airllm"].installed()


def test_airllm_is_given_the_same_weights_in_the_layout_of_the_hub(tmp_path, steered):
    """Which transformers itself can say: its model routes and decodes as recorded."""
    _, _, weights = steered
    hub_checkpoint.write(weights, tmp_path / "hub")
    assert len(list((tmp_path / "hub").glob("*.safetensors"))) == 3 + 3  # layers, and the rest
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hub")
    ids = torch.arange(PROMPT)[None] + FIRST_TOKEN
    text = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
    )
    assert text[0].tolist() == list(range(FIRST_TOKEN, FIRST_TOKEN + PROMPT + 8))


def test_the_layout_of_another_family_is_not_made_up(tmp_path, steered_gpt_oss):
    _, _, weights = steered_gpt_oss
    with pytest.raises(FlashMoEError, match="gpt_oss is not laid out as olmoe"):
        hub_checkpoint.write(weights, tmp_path / "none")


def test_a_job_goes_to_another_process_and_back():
    job = Job("llama-cpp", Path("a.gguf"), Path("b"), 5, "", 3, routing=Path("c"), cap_bytes=7)
    assert Job.from_json(job.to_json()) == job


@pytest.mark.parametrize("scheme", ["none", "int8", "int4"])
def test_llama_cpp_says_what_flashmoe_says(tmp_path, steered, scheme, monkeypatch):
    pytest.importorskip("gguf")
    bindings = pytest.importorskip("llama_cpp.llama_cpp")
    from harness.runs import gguf_file
    from harness.runs.peers import llama_cpp

    _, _, weights = steered
    gguf_file.write(weights, tmp_path / "a.gguf", scheme)
    job = Job(
        "llama-cpp", tmp_path / "a.gguf", tmp_path, 0, "", 4, prompt_tokens=PROMPT,
        warm_up_tokens=2,
    )  # fmt: skip
    found = llama_cpp.run(job)
    assert found["token_ids"] == list(range(FIRST_TOKEN, FIRST_TOKEN + PROMPT + 7))
    assert found["tokens"] == 4
    defaults = bindings.llama_model_default_params
    monkeypatch.setattr(bindings, "llama_model_default_params", defaults)  # put back at the end
    assert "not repacked" not in found["residency"]
    assert defaults().use_extra_bufts
    tight = llama_cpp.run(replace(job, cap_bytes=1))  # nothing enforces it here
    assert tight["token_ids"] == found["token_ids"]
    assert tight["residency"].endswith("not repacked")
    assert not bindings.llama_model_default_params().use_extra_bufts
