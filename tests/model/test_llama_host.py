"""Programs and files that cannot be streamed are one sentence; budgets hold whole events."""

from __future__ import annotations

import pytest
from command_line import refused, run
from hypothesis import given
from hypothesis import strategies as st

from flashmoe.engines.llama.hosts import flags, program
from flashmoe.errors import FlashMoEError
from flashmoe.residency import budget
from flashmoe.store.manifest import LayerSpec, Manifest


def test_a_program_that_is_none_of_llama_cpp_is_refused(capfd):
    assert "no program is called 'no-such-program'" in refused(capfd, "run", "no-such-program")
    assert "is not of a llama.cpp in shared libraries" in refused(capfd, "run", "/bin/ls")


def test_a_trace_that_cannot_be_written_is_refused_before_the_program_begins(capfd, tmp_path):
    for path, said in (
        (tmp_path / "t.txt", "must end in .npz"),
        (tmp_path / "n" / "t.npz", "be w"),
    ):
        assert said in refused(capfd, "run", "--record", path, "llama-server", "-m", "x.gguf")


@pytest.mark.parametrize("text", ["0", "-1", "inf", "nan", "often"])
def test_a_time_that_nobody_can_wait_is_refused(capfd, text):
    with pytest.raises(SystemExit):
        run(capfd, "run", "--stats-every", text, "llama-server", "-m", "x.gguf")
    assert f"--stats-every: invalid seconds value: '{text}'" in capfd.readouterr().err


def test_a_library_that_is_none_is_refused(tmp_path):
    own = tmp_path / "llama-server"
    own.write_text("#!/bin/sh\n")
    own.chmod(0o755)
    library = tmp_path / "libllama-server-impl.so"
    library.write_text("this is no library")
    assert program.find(str(own)) == library
    with pytest.raises(FlashMoEError, match="cannot be loaded"):
        program.run(library, [], lambda llama, ggml: None)


@pytest.mark.parametrize(
    "words",
    [
        ["--no-mmap"], ["-m", "x.gguf", "--load-mode", "none"], ["-lm", "dio"],
        ["--load-mode=mlock"], ["--models-dir", "models"], ["-m", "x.gguf", "--check-tensors"],
        ["-m", "x.gguf", "--direct-io"], ["--mmap", "0"], ["-lm", "mmap,none"],
    ],
)  # fmt: skip
def test_arguments_that_read_every_expert_are_refused(capfd, words):
    assert "under FlashMoE" in refused(capfd, "run", "llama-server", *words)


@pytest.mark.parametrize(
    "variables",
    [
        {"LLAMA_ARG_LOAD_MODE": "none"}, {"LLAMA_ARG_MMAP": "false"}, {"LLAMA_ARG_NO_MMAP": "1"},
        {"LLAMA_ARG_MODELS_DIR": "models"},
    ],
)  # fmt: skip
def test_the_same_said_by_the_environment_is_refused(capfd, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    said = refused(capfd, "run", "llama-server", "-m", "x.gguf")
    assert f"leave out {next(iter(variables))}" in said


@pytest.mark.parametrize(
    "words", [[], ["--port", "80"], ["--spec-default"], ["-mu", "http://x/y.gguf"], ["-m", ""]]
)
def test_a_server_without_a_model_is_a_router_and_refused(capfd, words):
    assert "without one it is a router" in refused(capfd, "run", "/x/llama-server", *words)


@pytest.mark.parametrize("name", ["LLAMA_ARG_MODEL", "LLAMA_ARG_HF_REPO"])
def test_a_variable_without_a_value_names_no_model(name):
    with pytest.raises(FlashMoEError, match="without one it is a router"):
        flags.check("llama-server", [], {name: ""})


@pytest.mark.parametrize(
    "words", [["-hf", "a/b"], ["--model=x"], ["--version"], ["--gpt-oss-20b-default"]]
)
def test_a_server_that_is_no_router_is_let_through(words):
    flags.check("llama-server", words, {})


def test_other_arguments_are_the_programs_own():
    words = ["-m", "x.gguf", "--load-mode", "mmap", "--mlock", "-lm", "mmap+mlock", "-c", "1"]
    flags.check("llama-server", words, {"LLAMA_ARG_LOAD_MODE": "auto", "LLAMA_ARG_MMAP": "1"})
    flags.check("llama-server", [], {"LLAMA_ARG_MODEL": "x.gguf"})
    flags.check("llama-bench", [], {})


def a_layer(extent_bytes: int, n_experts: int) -> LayerSpec:
    return LayerSpec("blk.0", n_experts, 0, extent_bytes, ())


@given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=6),
    st.integers(1, 64),
    st.integers(1, 10**6),
)
def test_a_budget_holds_the_slots_and_all_experts_of_any_one_layer(sizes, n_experts, memory_bytes):
    layers = tuple(a_layer(size, n_experts) for size in sizes)
    manifest = Manifest("", "", 1, "", "", 0, layers)
    least = budget.least_bytes(manifest, whole_events=True)
    options = dict(policy_can_share=True, reserve_spares=True, whole_events=True)
    if memory_bytes < least:
        with pytest.raises(FlashMoEError, match="all experts of a layer at once"):
            budget.divide(manifest, memory_bytes, **options)
        return
    slots = budget.divide(manifest, memory_bytes, **options)
    assert not slots.shared
    assert n_experts * max(sizes) <= memory_bytes
    (n_slots,) = set(slots.n_slots)
    most_bytes = n_slots * sum(sizes) + slots.spares * max(sizes)
    assert most_bytes <= memory_bytes
    assert n_slots == n_experts or most_bytes + sum(sizes) > memory_bytes
