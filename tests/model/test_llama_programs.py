"""Unmodified programs of llama.cpp under `flashmoe run`: what they give without it, they give.

FLASHMOE_LLAMA_BIN is a folder with them; else they are looked for on PATH (`nox -s llama`).
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gguf
import numpy as np
import pytest

from flashmoe import trace
from harness.runs.gguf_systems import Work, server_process
from harness.runs.llama_client import free_port
from harness.tiny_gguf import EXPERTS
from harness.torture.llama_server import ALIKE, Server, under_flashmoe

PROMPTS = ["a", "hello world, this is a prompt. " * 3, "x1y2z3 " * 60, "and now, another one"]
CONTEXT = ("-c", "2048")


def program(name: str) -> Path:
    found = shutil.which(name, path=os.environ.get("FLASHMOE_LLAMA_BIN") or None)
    if found is None:
        pytest.skip(f"there is no {name}: set FLASHMOE_LLAMA_BIN")
    return Path(found)


@pytest.fixture(scope="module")
def model(gguf_files) -> Path:
    return gguf_files("qwen3_moe", "int8")


@pytest.fixture(scope="module")
def budget(model) -> int:
    """Bytes: so few that a prompt needs more experts than there are slots."""
    return model.stat().st_size // 2


@pytest.fixture
def serve(model, budget, tmp_path):
    """Start llama-server, with the cache or without; it ends with the test."""
    servers = []

    def start(*arguments, cached=True, options=(), own_model=model) -> Server:
        command = [program("llama-server"), "-m", own_model, *ALIKE, *CONTEXT]
        if cached:
            command = [*under_flashmoe(budget, *options), *command]
        log = tmp_path / f"server-{len(servers)}.log"
        servers.append(Server(command, log, arguments=arguments))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture(scope="module")
def plain(model, tmp_path_factory):
    """The answers of llama-server alone to PROMPTS, one after the other."""
    command = [program("llama-server"), "-m", model, *ALIKE, *CONTEXT]
    with Server(command, tmp_path_factory.mktemp("plain") / "log", arguments=("-np", "1")) as alone:
        return [alone.ask(prompt) for prompt in PROMPTS]


def tokens(answers):
    return [answer["tokens"] for answer in answers]


def run(*command, **options) -> subprocess.CompletedProcess:
    settings = dict(capture_output=True, text=True, errors="backslashreplace", timeout=300)
    return subprocess.run(command, **settings | options)


def whole(*command) -> subprocess.CompletedProcess:
    """A program by itself, again where it lost the end of what it had to write."""
    for _ in range(5):
        done = run(*command)
        if done.returncode or done.stdout.endswith("\n\n"):
            break
    return done


def test_a_server_gives_its_own_tokens_and_counts_at_its_end(serve, plain):
    server = serve("-np", "1", options=["--stats"])
    assert [server.ask(prompt) for prompt in PROMPTS] == plain
    assert server.get("/health") == {"status": "ok"}
    assert server.stop() == 0
    stats = json.loads(server.words().splitlines()[-1])
    assert stats["slots_per_layer"] < EXPERTS
    assert stats["requests"] > stats["hits"] > 0


def test_a_server_reads_its_file_from_two_drives(serve, plain, model, budget, tmp_path):
    copy = shutil.copy(model, tmp_path / model.name)
    options = ["--stats", "--also", str(tmp_path)]  # the copy's folder
    server = serve("-np", "1", options=options)
    assert [server.ask(prompt) for prompt in PROMPTS] == plain
    assert server.stop() == 0
    stats = json.loads(server.words().splitlines()[-1])
    assert min(stats["bytes_by_drive"]) > 0.1 * stats["bytes_read"]
    os.truncate(copy, 4096)
    refused = run(*under_flashmoe(budget, *options), program("llama-server"), "-m", model)
    assert refused.returncode
    assert f"{copy} is not the same file as {model} (it has 4096 bytes" in refused.stderr


def test_the_referees_run_is_recorded(model, budget, tmp_path):
    own = program("llama-server")
    work = Work(own.parent, model, 0, tuple(range(20, 60)), 8, 1, trace=tmp_path / "trace.npz")
    run = server_process.measure(work, own, "--no-repack", memory=str(budget))
    info = trace.load(run["trace"]).info
    assert info["slots"] == run["slots_per_layer"] < EXPERTS
    assert info["hits"] / info["requests"] == run["hit_rate"]
    (tmp_path / "trace.npz").unlink()
    assert "trace" not in server_process.measure(work, own)  # without FlashMoE


def test_a_server_tells_its_counts_while_it_runs(serve, plain):
    server = serve("-np", "1", options=["--stats-every", "0.1"])  # which has no engine at first

    def lines() -> list[dict]:
        return [json.loads(line) for line in server.words().splitlines() if line.startswith('{"')]

    assert [server.ask(prompt) for prompt in PROMPTS] == plain
    seen, end = len(lines()), time.monotonic() + 60
    while len(lines()) < seen + 2 and time.monotonic() < end:
        time.sleep(0.1)
    assert server.stop() == 0
    told = lines()
    assert len(told) >= 2
    assert told[-1]["requests"] > told[-1]["hits"] > 0
    for key in ("at_seconds", "requests", "bytes_read"):
        assert [one[key] for one in told] == sorted(one[key] for one in told)


def test_four_slots_at_once_give_what_one_gives(serve, plain):
    server = serve("-np", "4", "-kvu")
    for _ in range(2):
        assert tokens(server.ask_all(PROMPTS)) == tokens(plain)


def test_prefixes_are_reused(serve):
    """Plain and cached keep the same prefixes and go on from them alike."""
    answers = []
    for cached in (False, True):
        server = serve("-np", "1", cached=cached)
        first = server.post("/completion", {"prompt": PROMPTS[2], "n_predict": 1})
        body = {"prompt": PROMPTS[2] + "more", "n_predict": 8, "temperature": 0, "n_probs": 3}
        second = server.post("/completion", body)
        assert first["tokens_cached"] > 0
        assert 0 < second["timings"]["prompt_n"] < 10
        answers.append((second["content"], second["completion_probabilities"]))
    assert answers[0] == answers[1]


def test_chat_and_embeddings_are_the_programs_own(serve):
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 0}
    given = []
    for cached in (False, True):
        arguments = ("-np", "1", "--embeddings", "--pooling", "mean", "--chat-template", "chatml")
        server = serve(*arguments, cached=cached)
        embedding = server.post("/v1/embeddings", {"input": PROMPTS[1]})["data"][0]["embedding"]
        message = server.post("/v1/chat/completions", chat)
        given.append((embedding, message["choices"][0]["message"]["content"]))
    assert given[0] == given[1]
    assert len(given[0][0]) == 256


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_as_they_end_it_alone(serve, number):
    """While it waits, and while it decodes."""
    for interrupt, attempts in ((Server.stop, 1), (interrupt_while_it_decodes, 4)):
        statuses = []
        for cached in (False, True):
            # llama.cpp's handler takes a lock that a thread which decodes may hold (b11434)
            for _ in range(attempts):
                server = serve("-np", "1", cached=cached, options=["--stats"])
                server.post("/completion", {"prompt": "a", "n_predict": 1})  # it listens now
                with suppress(subprocess.TimeoutExpired):
                    statuses.append(interrupt(server, number))
                    break
        assert statuses[0] == statuses[1]
    assert server.words().splitlines()[-1].startswith('{"policy"')


def interrupt_while_it_decodes(server: Server, number: int) -> int:
    body = {"prompt": PROMPTS[2], "n_predict": 1500, "ignore_eos": True, "stream": True}
    request = run_in_background(server, body)
    server.process.send_signal(number)
    request.kill()  # else a server alone may wait half a minute for its reader
    request.communicate()
    return server.process.wait(20)


def run_in_background(server: Server, body: dict) -> subprocess.Popen:
    """A request that has begun to be answered."""
    code = (
        "import sys, urllib.request\n"
        "answer = urllib.request.urlopen(sys.argv[1], sys.argv[2].encode())\n"
        "print(answer.readline(), flush=True)\n"
        "answer.read()\n"
    )
    request = subprocess.Popen(
        [sys.executable, "-c", code, f"{server.address}/completion", json.dumps(body)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert request.stdout.readline()
    return request


COMPLETION = ("-p", "hello", "-n", "12", "-c", "256", "-no-cnv", "--temp", "0", *ALIKE)


def test_completion_writes_what_it_writes_alone(model, budget):
    command = [program("llama-completion"), "-m", model, *COMPLETION]
    alone, cached = whole(*command), run(*under_flashmoe(budget), *command)
    assert alone.returncode == cached.returncode == 0
    assert cached.stdout == alone.stdout != ""


def test_flashmoe_serve_runs_the_users_own_server(model, budget, plain, tmp_path):
    own = program("llama-server")
    command = ["env", f"PATH={own.parent}", sys.executable, "-m", "flashmoe", "serve", model]
    command += ["--memory", str(budget), "--policy", "lru", "--page-port", str(free_port())]
    after = ("--", "-np", "1", *ALIKE)
    with Server(command, tmp_path / "log", arguments=after) as server:
        assert [server.ask(prompt) for prompt in PROMPTS] == plain
        assert "llama_server: listening on" in server.words()  # the wheel's has another name
        assert server.stop(signal.SIGINT) == 0


def test_a_bad_argument_is_the_programs_own_matter(model, budget):
    command = [program("llama-completion"), "-m", model, "--no-such-argument"]
    alone, cached = run(*command), run(*under_flashmoe(budget), *command)
    assert cached.returncode == alone.returncode != 0
    assert alone.stderr.splitlines()[-1] == cached.stderr.splitlines()[-1]


def test_perplexity_is_the_same_figure(model, budget, tmp_path):
    text = tmp_path / "text"
    text.write_text("the quick brown fox jumps over the lazy dog 0123456789 " * 20)
    command = [program("llama-perplexity"), "-m", model, "-f", text, "-c", "256", "-b", "128"]
    command += ["-t", "1", "--no-repack"]
    alone, cached = whole(*command), run(*under_flashmoe(budget), *command)
    assert alone.returncode == cached.returncode == 0
    assert "[1]" in alone.stdout
    assert alone.stdout.splitlines()[1:] == cached.stdout.splitlines()[1:]  # after the times


def test_bench_runs_and_its_output_is_its_own(model, budget):
    own = [program("llama-bench"), "-m", model, "-p", "16", "-n", "4", "-r", "1", "-t", "1"]
    done = run(*under_flashmoe(budget, "--stats"), *own, "-o", "json", "-ngl", "0,9")
    assert done.returncode == 0, done.stderr[-1000:]
    rows = [(row["n_prompt"], row["n_gen"]) for row in json.loads(done.stdout)]
    assert rows == [(16, 0), (0, 4)] * 2
    assert json.loads(done.stderr.splitlines()[-1])["requests"] > 0


@pytest.mark.parametrize(
    "words",
    [
        ["-ngl", "99"], ["--cpu-moe"], ["-ot", "exps=CPU"], ["-lm", "mmap+mlock"],
        ["--repack"], ["--numa", "distribute"],
    ],
)  # fmt: skip
def test_arguments_that_move_or_lock_experts_are_harmless(model, budget, words):
    command = [program("llama-completion"), "-m", model, *COMPLETION]
    alone, cached = whole(*command), run(*under_flashmoe(budget, "--stats"), *command, *words)
    assert cached.returncode == 0, cached.stderr[-1000:]
    assert cached.stdout == alone.stdout
    assert json.loads(cached.stderr.splitlines()[-1])["resident_bytes"] <= budget


def test_an_adapter_of_experts_gives_what_it_gives_alone(model, budget, tmp_path):
    adapter = write_adapter(tmp_path / "adapter.gguf")
    command = [program("llama-completion"), "-m", model, *COMPLETION]
    bare = whole(*command)
    command += ["--lora", adapter]
    alone, cached = whole(*command), run(*under_flashmoe(budget), *command)
    assert alone.returncode == cached.returncode == 0, cached.stderr[-1000:]
    assert cached.stdout == alone.stdout != bare.stdout


def write_adapter(path: Path) -> Path:
    """A LoRA of rank 2 on the first layer's experts."""
    chance = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 64.0)
    for kind, width, height in (("gate", 256, 128), ("up", 256, 128), ("down", 128, 256)):
        name = f"blk.0.ffn_{kind}_exps.weight"
        for part, shape in (("a", (EXPERTS, 2, width)), ("b", (EXPERTS, height, 2))):
            values = chance.normal(size=shape).astype(np.float32)
            writer.add_tensor(f"{name}.lora_{part}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refused(*command, **options) -> str:
    """The one sentence of FlashMoE's that a failing program comes with."""
    done = run(*command, **options)
    assert done.returncode > 0, (done.returncode, done.stderr[-1000:])
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("flashmoe: ")]
    assert len(said) == 1, done.stderr[-1000:]
    return said[0]


def test_a_second_model_with_experts_is_refused(gguf_files, model, budget):
    other = gguf_files("olmoe")
    own = [program("llama-bench"), "-p", "1", "-n", "0", "-r", "1", "-m", other, "-m", model]
    done = run(*under_flashmoe(budget), *own)
    assert done.returncode != 0
    assert "of two models with experts only one can be streamed" in done.stderr


def test_a_draft_model_that_is_the_same_file_shares_its_experts(serve, model, plain):
    server = serve("-np", "1", "-md", str(model), "--spec-type", "draft-simple")
    assert tokens([server.ask(prompt) for prompt in PROMPTS]) == tokens(plain)


def test_too_little_address_space_is_one_sentence(model, budget, tmp_path):
    """The file is longer than all of the space that a process may have here."""
    large = shutil.copy(model, tmp_path / "large.gguf")
    os.truncate(large, 1 << 40)  # a hole at its end
    limit = 64 << 30
    said = refused(
        *under_flashmoe(budget), program("llama-completion"), "-m", large, *COMPLETION,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )  # fmt: skip
    assert "no address space for its 1024.0 GiB" in said
    assert "ulimit -v" in said


def test_a_repository_that_lists_models_for_a_router_is_refused(budget, tmp_path):
    branches = {"branches": [{"name": "main", "targetCommit": "0" * 40}]}
    files = [{"type": "file", "path": "preset.ini", "size": 9, "oid": "1" * 40}]

    class Repository(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(branches if self.path.endswith("refs") else files).encode())

    with ThreadingHTTPServer(("127.0.0.1", 0), Repository) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        try:
            said = refused(
                *under_flashmoe(budget), program("llama-server"), "-hf", "a/b",
                env=os.environ | {"MODEL_ENDPOINT": address, "LLAMA_CACHE": str(tmp_path)},
            )  # fmt: skip
        finally:
            server.shutdown()
    assert "this one lists models for a router" in said


def test_a_budget_below_a_layers_experts_is_one_sentence(model):
    command = [program("llama-completion"), "-m", model, *COMPLETION]
    assert "is too small" in refused(*under_flashmoe("100KiB"), *command)


def test_a_refused_mapping_is_not_called_a_success(model):
    command = [program("llama-completion"), "-m", model, *COMPLETION]
    done = run(*under_flashmoe("100KiB"), *command)
    assert "mmap failed: Cannot allocate memory" in done.stderr


def test_a_file_that_was_cut_short_is_refused(model, budget, tmp_path):
    short = shutil.copy(model, tmp_path / "short.gguf")
    os.truncate(short, model.stat().st_size // 2)
    done = run(*under_flashmoe(budget), program("llama-completion"), "-m", short, *COMPLETION)
    assert done.returncode > 0
    assert "Traceback" not in done.stderr
    assert "error loading model" in done.stderr
