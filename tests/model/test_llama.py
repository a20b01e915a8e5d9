"""llama.cpp's own server with the cache under it: its own tokens, within the budget."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import llama_process
import pytest

from flashmoe import trace
from flashmoe.cache import simulate
from harness.tiny_gguf import EXPERTS, LAYERS, TOP_K
from harness.torture.llama_faults import order, serve
from harness.torture.llama_server import Server

PROMPTS = ["a", "hello world, this is a prompt. " * 3, "x1y2z3 " * 60]


def run(model: Path, memory: str | None, **job: object) -> dict:
    """What `llama_server.py` prints."""
    job = {"model": str(model), "memory": memory, "prompts": PROMPTS} | job
    return llama_process.run("llama_server.py", **job)


@pytest.fixture(scope="session")
def plain(gguf_files):
    """The answers of llama.cpp alone."""
    answers: dict[tuple[str, str], list] = {}

    def get(family: str, scheme: str) -> list:
        if (family, scheme) not in answers:
            answers[family, scheme] = run(gguf_files(family, scheme), None)["answers"]
        return answers[family, scheme]

    return get


@pytest.mark.parametrize("slots", ["few", "half", "all"])
@pytest.mark.parametrize(
    ("family", "scheme"), [("olmoe", "int4"), ("qwen3_moe", "int8"), ("olmoe", "none")]
)
def test_tokens_and_probabilities_are_llama_cpps_own(gguf_files, plain, family, scheme, slots):
    """Prompts need more experts at a layer than it has slots; the file is never mapped."""
    model = gguf_files(family, scheme)
    experts_bytes = model.stat().st_size  # less than 1 MiB of it is anything else
    share = {"few": 0.4, "half": 0.6, "all": 1.2}[slots]
    memory_bytes = int(experts_bytes * share)
    result = run(model, str(memory_bytes))
    assert result["answers"] == plain(family, scheme)
    assert [len(answer["tokens"]) for answer in result["answers"]] == [12] * len(PROMPTS)
    stats = result["stats"]
    assert stats["requests"] > stats["hits"] > 0
    assert stats["resident_bytes"] <= memory_bytes
    assert result["rss_bytes"] <= result["dense_bytes"] + memory_bytes
    assert (stats["slots_per_layer"] == EXPERTS) == (slots == "all")
    assert not result["mapped"]
    assert result["layers_to_guess"] == LAYERS


def test_a_request_that_comes_before_python_knows_of_the_server_is_answered_right(
    gguf_files, tmp_path
):
    model = gguf_files()
    late = str(llama_process.TESTS / "llama_late.py")
    command = [sys.executable, late, str(model), str(model.stat().st_size // 2)]
    with Server(command, tmp_path / "log") as server:
        early = server.ask(PROMPTS[0])
        order(server, "mend")  # is answered once Python knows
        assert server.ask(PROMPTS[0]) == early


def test_a_file_on_two_drives_is_read_from_both_and_outlives_one(gguf_files, plain):
    result = llama_process.run("llama_drives.py", model=str(gguf_files()), prompts=PROMPTS)
    assert all(answers == plain("olmoe", "int4") for answers in result["answers"])
    first, second = result["spread"]
    assert 0.1 < first / (first + second) < 0.9  # reads are small, and both on one drive
    assert 3 <= result["failed reads"] <= 3 + 8  # each thread may have one under way
    once, alone = (line for line in result["said"] if "copy of it.gguf" in line)
    assert "a read failed (Input/output error); the other copy is read in its place" in once
    assert "is left alone from now on" in alone
    assert result["failed"]["status"] == 500
    refused = result["refused"]
    assert "is not the same file as" in refused["other.gguf"]
    assert "it has 4096 bytes" in refused["shorter.gguf"]
    assert "name a copy on another drive" in refused[gguf_files().name]
    assert "none.gguf cannot be read (No such file or directory)" in refused["none.gguf"]


@pytest.mark.parametrize("how", [{"slow": True}, {"slow": True, "unnamed": True}])
def test_late_reads_are_there_before_they_are_multiplied(gguf_files, plain, how):
    memory = str(gguf_files().stat().st_size // 2)
    assert run(gguf_files(), memory, **how)["answers"] == plain("olmoe", "int4")


def test_a_budget_that_changes_while_tokens_are_computed_changes_no_token(gguf_files, tmp_path):
    model = gguf_files()
    size = model.stat().st_size
    with serve(model, tmp_path / "log") as server:
        expected = [server.ask(prompt)["tokens"] for prompt in PROMPTS]
        for number in range(4):
            with ThreadPoolExecutor(1) as thread:
                answer = thread.submit(server.ask, PROMPTS[number % 3])
                resizes = 0
                while not answer.done():
                    order(server, f"resize {size // 2 if resizes % 2 else size}")
                    resizes += 1
                assert resizes > 1
                assert answer.result()["tokens"] == expected[number % 3]


def test_slots_of_the_server_give_what_one_gives(gguf_files, plain):
    result = run(gguf_files(), str(gguf_files().stat().st_size // 2), n_parallel=3)
    tokens = [answer["tokens"] for answer in result["answers"]]
    assert tokens == [answer["tokens"] for answer in plain("olmoe", "int4")]


def test_a_failed_read_fails_its_request_and_no_other(gguf_files, plain):
    memory = str(gguf_files().stat().st_size // 2)
    result = run(gguf_files(), memory, fail_after=8, prompts=[PROMPTS[0], *PROMPTS])
    failed, *answers = result["answers"]
    assert failed == {"status": 500}
    assert answers == plain("olmoe", "int4")


def test_a_run_begins_with_what_the_last_one_ended_with(gguf_files, plain, tmp_path):
    memory = str(gguf_files().stat().st_size * 3 // 4)
    cold, warm = (run(gguf_files(), memory, warm=str(tmp_path / "kept.npz")) for _ in range(2))
    assert cold["answers"] == warm["answers"] == plain("olmoe", "int4")
    assert warm["stats"]["misses"] < cold["stats"]["misses"]


def test_a_budget_below_a_layers_experts_is_one_sentence(gguf_files):
    said = run(gguf_files(), "100KiB")["refused"]
    assert "memory=100KiB is too small: a prompt may need all experts of a layer" in said


@pytest.mark.parametrize(("policy", "n_parallel"), [("lru", 1), ("learned", 3)])
def test_a_recorded_run_replayed_gives_the_same_hits(gguf_files, tmp_path, policy, n_parallel):
    """Prompts of several ubatches, of which the last layer computes one token, or none."""
    path = tmp_path / "trace.npz"
    memory = str(gguf_files("qwen3_moe").stat().st_size // 2)
    job = dict(record=str(path), policy=policy, n_parallel=n_parallel, n_ubatch=32)
    stats = run(gguf_files("qwen3_moe"), memory, **job)["stats"]
    recorded = trace.load(path)
    assert (recorded.n_layers, recorded.top_k, recorded.n_experts) == (LAYERS, TOP_K, EXPERTS)
    assert recorded.computed[:, :-1].all()
    last = [recorded.computed[step, -1] for step in recorded.steps(slice(0, len(recorded.step)))]
    assert {int(rows.sum()) for rows in last} >= {0, 1}
    assert max(len(rows) for rows in last) == 32
    assert recorded.info["bypass_slots"] == stats["bypass_slots"]
    assert stats["bypass_slots"] == (TOP_K if policy == "learned" else 0)
    conditions = simulate.Conditions(as_recorded=True)
    outcome = simulate.replay(recorded, policy, 1.0, conditions, stats["slots_per_layer"])
    assert (outcome.requests, outcome.hits) == (stats["requests"], stats["hits"])
    assert recorded.info["slots"] == stats["slots_per_layer"] < EXPERTS
    assert recorded.info["hits"] == stats["hits"] > 0
