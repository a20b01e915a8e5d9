"""A plan knows what a model takes, and reads nothing but the heads of its files."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import gguf_models
import hub_server
import pytest
import tiny
import torch
import transformers
from command_line import refused, run
from hub_server import environment

from flashmoe import engines
from flashmoe.disk.direct_io import ALIGNMENT_BYTES
from flashmoe.plan import machine
from harness.runs import gguf_file
from harness.runs.model_heads import checkpoint_facts, gguf_facts, write_checkpoint, write_gguf

NAME = "olmoe-1b-7b"
_PLANS = """
import sys
from flashmoe import cli
from flashmoe.plan import machine
machine.measure = lambda *_: machine.Machine(20 << 30, 2, True, 20e9, 1e9, 2e9, "no drive")
for name in sys.argv[1:]:
    if cli.main(["plan", name, "--json"]):
        print("refused")
"""


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_checkpoint_takes_what_transformers_makes_of_it(family, tmp_path):
    path = tiny.make_checkpoint(family, tmp_path)
    facts = engines.engine_for(path).describe(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    sizes = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    count = facts.layers * facts.n_experts
    assert facts.expert_parameters == sum(
        p.numel() for name, p in model.named_parameters() if ".experts." in name
    )
    assert experts <= facts.experts_bytes < experts + count * ALIGNMENT_BYTES  # of each extent
    dense = sum(size for name, size in sizes.items() if ".experts." not in name)
    assert facts.dense_bytes == pytest.approx(dense, rel=0.01)
    embedding = sizes["model.embed_tokens.weight"]
    assert facts.dense_bytes - facts.dense_token_bytes == embedding
    with torch.inference_mode():
        cache = model(tiny.prompt(10), use_cache=True).past_key_values
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    assert facts.cache_bytes(10) == sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v2"])
def test_a_gguf_file_takes_what_lies_in_it(family, tmp_path):
    path = tmp_path / "model.gguf"
    weights = gguf_models.weights(family)
    gguf_file.write(weights, path, "q4_0")
    facts = engines.engine_for(path).describe(path)
    assert facts.weights == "q4_0"
    assert (facts.n_experts, facts.top_k) == (gguf_models.EXPERTS, gguf_models.TOP_K)
    assert facts.layers == len(weights.description.layers)
    assert facts.expert_parameters * 4.5 / 8 == facts.experts_bytes
    assert 0 <= path.stat().st_size - facts.total_bytes < 100_000  # the head, and alignment
    width = weights.config.hidden_size
    assert facts.dense_bytes - facts.dense_token_bytes == 2 * width * weights.config.vocab_size
    if family == "olmoe":  # keys and values of four heads, in float16
        assert facts.kv_bytes == gguf_models.LAYERS * 2 * width * 2


def test_a_plan_of_a_directory_names_a_command_that_can_be_pasted(tmp_path, capfd, monkeypatch):
    path = tiny.make_checkpoint("olmoe", tmp_path / "a model")
    monkeypatch.setattr(machine, "_TEST_FILE_BYTES", 2 << 20)
    status, out, _ = run(capfd, "plan", path)
    assert status == 0
    assert f"flashmoe generate '{path}' --memory" in out
    assert "layers x 8" in out
    status, out, _ = run(capfd, "plan", path, "--json", "--context", 100)
    plan = json.loads(out)
    assert plan["facts"]["n_experts"] == 8
    assert plan["budgets"][-1]["budget"] == "auto"
    assert plan["machine"]["drive_bytes_per_second"] > 0
    _, out, _ = run(capfd, "plan", path, "--arithmetic", "fast", "--memory", "1MiB")
    assert f"flashmoe generate '{path}' --memory 1MiB --arithmetic fast" in out
    assert "flashmoe serve" not in out  # which has but one arithmetic
    assert [file.name for file in tmp_path.iterdir()] == ["a model"]


def test_what_cannot_be_planned_is_one_sentence(tmp_path, capfd):
    assert "no such directory" in refused(capfd, "plan", tmp_path / "none")
    assert "no such file" in refused(capfd, "plan", tmp_path / "none.gguf")
    assert "holds no config.json" in refused(capfd, "plan", tmp_path)
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF and then nothing")
    assert "fetch it again" in refused(capfd, "plan", tmp_path / "damaged.gguf")
    assert "at least 1" in refused(capfd, "plan", tmp_path, "--context", 0)


def test_of_a_model_on_the_hub_only_heads_are_fetched(tmp_path):
    """The files have their real sizes, and no weights: 14, 4.6 and 7.4 GB."""
    for folder in ("checkpoint", "ggufs", "damaged", "pickles"):
        (tmp_path / folder).mkdir()
    write_checkpoint(NAME, tmp_path / "checkpoint")
    for scheme in ("q4_0", "q8_0"):
        write_gguf(NAME, tmp_path / "ggufs" / f"a-{scheme}.gguf", scheme)
    (tmp_path / "damaged" / "a.gguf").write_bytes(b"GGUF" + b"\xff" * (3 << 20))
    (tmp_path / "pickles" / "config.json").write_bytes(b"{}")
    names = ["org/checkpoint", "org/ggufs", "org/ggufs:a-q8_0.gguf"]
    bad = ["org/none", "org/damaged:a.gguf", "org/pickles", "org/ggufs:b.gguf"]
    served = {f"org/{folder.name}": folder for folder in tmp_path.iterdir()}
    with hub_server.serve(served) as (address, asked):
        done = subprocess.run(
            [sys.executable, "-c", _PLANS, *names, *bad],
            env=environment(tmp_path / "cache", address),
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
    *plans, first, second, third, fourth = done.stdout.splitlines()
    assert {first, second, third, fourth} == {"refused"}
    sentences = [line for line in done.stderr.splitlines() if line.startswith("flashmoe: ")]
    assert len(sentences) == len(bad)
    assert all(name.partition(":")[0] in said for name, said in zip(bad, sentences, strict=True))
    checkpoint, chosen, named = map(json.loads, plans)
    assert checkpoint["facts"]["experts_bytes"] == checkpoint_facts(NAME).experts_bytes
    assert named["facts"]["experts_bytes"] == gguf_facts(NAME, "q8_0").experts_bytes
    # all of it fits, so the fewer bytes of 4 bits are the fastest
    assert chosen["model"] == "org/ggufs:a-q4_0.gguf"
    assert [one["file"] for one in chosen["files"]] == ["a-q4_0.gguf", "a-q8_0.gguf"]
    assert chosen["commands"] == ["flashmoe serve org/ggufs:a-q4_0.gguf --memory "
                                  f"{_memory(chosen)} --context 4096"]  # fmt: skip
    sent = [int(found[1]) for line in asked if (found := re.search(r" (\d+) bytes$", line))]
    assert max(sent) <= 4 << 20
    assert sum(sent) < 32 << 20
    assert all("bytes" in line for line in asked if line.startswith("GET") and "resolve" in line)
    assert not (tmp_path / "cache").exists()


def _memory(plan: dict) -> str:
    advised = plan["advised"]
    return "auto" if advised["budget"] == "auto" else f"{-(-advised['memory_bytes'] >> 20)}MiB"
