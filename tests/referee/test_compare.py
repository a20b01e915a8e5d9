"""One table of engines that read different files: in turn, resumable, and with room on the disk."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flashmoe.engines.transformers.checkpoints import named_models
from flashmoe.errors import FlashMoEError
from flashmoe.trace import Trace
from harness.report import report
from harness.runs import contenders, disturbance, peers
from harness.runs.contenders import STORE, Contender
from harness.runs.gguf_systems import BENCH, capped_program
from harness.runs.gguf_systems.llama_server import PLAIN
from harness.runs.job import FIRST_TOKEN, prompt_ids
from harness.runs.memory_cap import memory_cap
from harness.runs.same_weights import SameWeights
from harness.tables import compare, compare_rows, full_scale

SPEEDS = {"flashmoe": 8.0, PLAIN: 2.0, "bench": 4.0}


def outcome(speed: float, **more: object) -> dict[str, object]:
    return {
        "outcome": "ok", "tokens_per_second": speed, "first_token_seconds": 1 / speed,
        "bytes_per_token": 1e8, "peak_memory_bytes": 5, "token_ids": [1, 2], "load_seconds": 1.0,
    } | more  # fmt: skip


@pytest.fixture
def place(monkeypatch, tmp_path):
    """No weights are written, no drive is asked; gives a folder and the cases that were run."""
    asked: list[tuple[str, contenders.Case]] = []
    monkeypatch.setattr(compare, "drop_all", lambda: None)
    monkeypatch.setattr(compare, "_drive", lambda path, kind: 1e9)
    monkeypatch.setattr(disturbance, "AGAIN_SECONDS", 0)  # nothing is measured again
    monkeypatch.setattr(report, "record", lambda *a, **b: None)
    monkeypatch.setattr(
        SameWeights, "write", lambda weights, kind: weights.path(kind).touch() or weights.path(kind)
    )
    return tmp_path, asked


def contender(name, asked, files=STORE, like="flashmoe", **more):
    def run(case):
        asked.append((name, case))
        return outcome(SPEEDS[name])

    return Contender(name, files, like, run, **more)


def plan_of(asked, **options):
    three = [
        contender("flashmoe", asked),
        contender(PLAIN, asked, peers.GGUF, PLAIN),
        contender("bench", asked, peers.GGUF, PLAIN, clock=BENCH),
    ]
    options = {"caps": (0.4, 0.6), "weights": ("bf16", "int4")} | options
    return compare.Plan("olmoe-quarter", three, **options)


def test_systems_take_turns_and_each_reads_its_own_files(place):
    folder, asked = place
    compare.compare(folder, "command", plan_of(asked, rounds=2, caps=(0.2,), weights=("bf16",)))
    names = [name for name, _ in asked]
    assert names == ["flashmoe", PLAIN, "bench"] * 4  # two prompts, two rounds
    case = asked[0][1]
    assert set(case.files) == {STORE, peers.GGUF}
    assert [c.prompt_tokens for _, c in asked[::3]] == [160, 2000] * 2
    assert [c.only_first for _, c in asked[::3]] == [False, True] * 2
    assert not list(folder.glob(".scratch-*"))  # given back


def test_a_row_has_both_prompts_the_range_and_a_roofline(place):
    folder, asked = place
    plan = plan_of(asked, caps=(0.2,), weights=("bf16",), label="prompts")
    compare.compare(folder, "command", plan)
    rows = report.read(folder, "compare-olmoe-quarter-prompts").set_index("system")
    ours = rows.loc["flashmoe"]
    assert ours.rounds == 2
    assert ours.tokens_per_second == ours.tokens_per_second_max == 8
    assert ours.first_token_160_seconds == ours.first_token_2000_seconds == 0.125
    # 0.1 s of reading, 0.125 s of arithmetic as the fastest has it
    assert ours.roofline_tokens_per_second == pytest.approx(8)
    assert rows.loc[PLAIN].share_of_roofline == pytest.approx(0.25)
    assert rows.same_output.all()
    assert rows.loc["bench"].clock == BENCH


def test_an_interrupted_table_goes_on_where_it_was(place):
    folder, asked = place
    plan = plan_of(asked)
    last = plan.compared[-1]

    def interrupt(case):
        raise KeyboardInterrupt

    object.__setattr__(last, "run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compare.compare(folder, "command", plan)
    noted = full_scale.journal(folder, "compare-olmoe-quarter").read_text().splitlines()
    assert [json.loads(line)["run"]["system"] for line in noted] == ["flashmoe", PLAIN]
    before = len(asked)
    compare.compare(folder, "command", plan_of(asked, rounds=1))
    again = asked[before:]
    assert again[0][0] == "bench"
    assert not full_scale.journal(folder, "compare-olmoe-quarter").exists()


def test_limits_that_hold_everything_are_measured_once(place, capsys):
    folder, asked = place
    compare.compare(folder, "c", plan_of(asked, caps=(0.2, 0.6, 1.2), rounds=1, prompts=(160,)))
    rows = report.read(folder, "compare-olmoe-quarter")
    shares = {w: set(part.cap_share) for w, part in rows.groupby("weights")}
    assert shares == {"bf16": {0.2, 0.6, 1.2}, "int4": {0.2, 0.6}}
    assert "int4: all fits under 0.6, so 1.2 is left out" in capsys.readouterr().err


def test_a_full_disk_is_told_before_anything_is_written(place, monkeypatch, capsys):
    folder, asked = place
    usage = shutil.disk_usage(folder)._replace(free=10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(FlashMoEError, match=r"1\.0 GB free and the files take 7\.1"):
        compare.compare(folder, "command", plan_of(asked))
    assert asked == []
    assert "runs, at most 7.1 GB of disk at once" in capsys.readouterr().err


def test_a_system_that_fails_has_that_for_its_outcome(place):
    folder, asked = place
    plan = plan_of(asked, caps=(0.2,), rounds=1)

    def refuse(case):
        raise FlashMoEError("too little memory")

    object.__setattr__(plan.compared[0], "run", refuse)
    compare.compare(folder, "command", plan)
    rows = report.read(folder, "compare-olmoe-quarter")
    assert set(rows[rows.system == "flashmoe"].outcome) == {"too little memory"}
    assert set(rows[rows.system == PLAIN].outcome) == {"ok"}


def test_a_long_prompt_that_fails_has_an_outcome_of_its_own(place):
    folder, asked = place
    plan = plan_of(asked, caps=(0.2,), weights=("bf16",), rounds=1)

    def run(case):
        if case.only_first:
            raise FlashMoEError("no room for this prompt")
        return outcome(8)

    object.__setattr__(plan.compared[0], "run", run)
    compare.compare(folder, "command", plan)
    ours = report.read(folder, "compare-olmoe-quarter").set_index("system").loc["flashmoe"]
    assert (ours.outcome, ours.tokens_per_second) == ("ok", 8)
    assert ours.first_token_2000_outcome == "no room for this prompt"


def test_a_program_that_is_not_there_is_an_outcome(place):
    folder, asked = place
    plan = plan_of(asked, caps=(0.2,), weights=("bf16",), rounds=1)

    def run(case):
        capped_program.run(["/nowhere/llama-bench"], None)

    object.__setattr__(plan.compared[2], "run", run)
    compare.compare(folder, "command", plan)
    rows = report.read(folder, "compare-olmoe-quarter").set_index("system")
    assert rows.loc["bench"].outcome == "there is no llama-bench"


def test_every_system_decodes_from_the_first_token_on():
    case = contenders.Case(
        full_scale.job(full_scale.shipped_routing("olmoe-1b-7b"), Path("c"), Path("s")),
        {}, 1 << 30, 0, 160, False,
    )  # fmt: skip
    job = contenders._job(case)
    assert (job.warm_up_tokens, job.tokens) == (0, contenders.DECODED_TOKENS)
    assert contenders._job(replace(case, only_first=True)).tokens == 2


def test_other_tokens_than_those_of_the_same_kernels_are_told():
    known = [contender("flashmoe", []), contender(PLAIN, [], like=PLAIN)]
    about = {
        "weights": "bf16", "cap_share": 0.4, "cap_bytes": 1, "prompt_tokens": 160,
        "only_first": False, "drive_bytes_per_second": None,
    }  # fmt: skip
    runs = [
        about | {"system": "flashmoe"} | outcome(1.0),
        about | {"system": PLAIN} | outcome(1.0, token_ids=[1, 3]),
        about | {"system": "flashmoe"} | outcome(3.0, token_ids=[1, 4]),
    ]
    ours, plain = compare_rows.rows_of(runs, known, (160,))
    assert ours["same_output"] is False  # its second round is not as its first
    assert plain["same_output"] is True
    assert ours["tokens_per_second"] == 2


def test_who_cannot_run_is_left_out_with_a_reason(monkeypatch):
    monkeypatch.delenv("FLASHMOE_BMOE_CLI", raising=False)
    monkeypatch.setattr(peers.Peer, "installed", lambda peer: peer.name == "llama-cpp")
    found, reasons = contenders.available(None, ["mine=./run"])
    names = [c.name for c in found]
    assert {"flashmoe", "flashmoe-fast", "accelerate-disk", "llama-cpp", "mine"} <= set(names)
    assert PLAIN not in names
    assert f"{PLAIN} is left out: --programs names no build of llama.cpp" in reasons
    assert "airllm is left out: its library is not installed" in reasons
    assert "BigMoeOnEdge is left out: FLASHMOE_BMOE_CLI names no program" in reasons
    chosen = compare.choose(["flashmoe"], found)
    assert [c.name for c in chosen] == ["flashmoe", "mine"]
    with pytest.raises(FlashMoEError, match="'nobody' cannot run here"):
        compare.choose(["nobody"], found)
    with pytest.raises(FlashMoEError, match="two systems are called 'flashmoe'"):
        compare.Plan("olmoe-quarter", [found[0], found[0]])
    with pytest.raises(FlashMoEError, match="takes prompts of 4048 tokens at most"):
        compare.Plan("olmoe-quarter", found, prompts=(160, 8000))
    with pytest.raises(FlashMoEError, match="no weights are called 'int3'"):
        compare.Plan("olmoe-quarter", found, weights=("int3",))


def test_weights_that_a_system_cannot_take_have_a_reason(tmp_path):
    weights = SameWeights("gpt-oss-20b", "bf16", tmp_path, None)
    assert weights.refusal(peers.CHECKPOINT) == "gpt_oss is not written for it"
    assert weights.refusal(STORE) is None
    fewer = SameWeights("olmoe-1b-7b", "int4", tmp_path, None)
    assert fewer.refusal(peers.CHECKPOINT) == "it reads bf16 only, no int4"


@pytest.fixture
def tiny_model(monkeypatch, tmp_path):
    """A model of two layers that can be named, with a recorded sequence."""
    monkeypatch.setitem(named_models.MODELS, "tiny", {
        "model_type": "olmoe", "architectures": ["OlmoeForCausalLM"], "vocab_size": 1300,
        "hidden_size": 256, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 8,
        "num_experts_per_tok": 2, "max_position_embeddings": 1024, "eos_token_id": 1299,
    })  # fmt: skip
    every = np.tile(np.arange(8, dtype=np.uint8), (256, 2, 1))
    chosen = np.random.default_rng(0).permuted(every, axis=2)[..., :2]
    path = tmp_path / "routing.npz"
    Trace(chosen, np.zeros(256, np.int32), 8, info={"names": ["s"]}).save(path)
    monkeypatch.setitem(full_scale.MODELS, "tiny", full_scale.Routing(path, "s"))
    return "tiny"


@pytest.mark.slow
def test_ours_and_a_users_engine_in_one_table(tiny_model, tmp_path, monkeypatch):
    """Nothing is stubbed but the record of where the table came from."""
    with memory_cap(1 << 30) as cap:
        if cap is None:
            pytest.skip("no memory cgroup can be made here")
    monkeypatch.setattr(report, "record", lambda *a, **b: None)
    adapter = f"mine={sys.executable} -m harness.runs.engines.reference_adapter"
    found, _ = contenders.available(None, [adapter])
    chosen = compare.choose(["flashmoe"], found)
    share = (1 << 30) / named_models.total_bytes(tiny_model)
    plan = compare.Plan(tiny_model, chosen, caps=(share,), prompts=(200,), rounds=1)
    compare.compare(tmp_path, "command", plan)
    rows = report.read(tmp_path, "compare-tiny").set_index("system")
    assert set(rows.outcome) == {"ok"}
    for name in ("flashmoe", "mine"):
        row = rows.loc[name]
        assert row.tokens_per_second > 0
        assert row.first_token_200_seconds > 0
        assert 0 < row.peak_memory_bytes <= 1 << 30
    assert rows.loc["flashmoe"].same_output


@pytest.mark.parametrize("tokens", [30, 160, 2000])
def test_prompts_of_every_length_end_alike(tokens):
    ids = prompt_ids(tokens)
    assert len(ids) == tokens
    assert ids[-30:] == list(range(ids[-1] - 29, ids[-1] + 1))
    assert ids[-1] == FIRST_TOKEN + min(tokens, 160) - 1
    assert set(ids) <= set(range(FIRST_TOKEN, FIRST_TOKEN + 160))
