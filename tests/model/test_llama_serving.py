"""`flashmoe serve` of a GGUF file: OpenAI's client gets what llama.cpp's server alone gives."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import llama_process
import numpy as np
import openai
import pytest
from command_line import refused

from flashmoe.cli import serve
from flashmoe.engines.llama import context_size, kv_cache, tensor_library
from flashmoe.engines.llama.gguf_head import read_head
from flashmoe.engines.llama.hosts import flags
from flashmoe.errors import FlashMoEError
from harness.runs.llama_client import free_port
from harness.torture.llama_server import Server

KEY = "a key of the test's own"
ONE_KIND_OF_STEP = ("-t", "1", "-ub", "128", "--no-warmup")
CHATS = [
    [{"role": "user", "content": "hello"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "x1y2z3 " * 40},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "and now?"},
    ],
]
GREEDY = {"temperature": 0, "max_tokens": 12}


def start(log: Path, model: object, memory: int, *after: str, **variables: str) -> Server:
    command = [sys.executable, "-m", "flashmoe", "serve", str(model), "--policy", "lru"]
    command += ["--memory", str(memory), "--page-port", str(free_port())]
    # the wheel's server, whichever there is on PATH; env knows what the test does
    own = {"PATH": str(Path(sys.executable).parent)} | variables
    command = ["env", *(f"{name}={value}" for name, value in own.items()), *command]
    return Server(command, log, arguments=("--", *after))


@pytest.fixture(scope="module")
def served(gguf_files, tmp_path_factory):
    model = gguf_files()
    log = tmp_path_factory.mktemp("serve") / "log"
    memory = model.stat().st_size // 2
    with start(log, model, memory, *ONE_KIND_OF_STEP, FLASHMOE_API_KEY=KEY) as server:
        yield server


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.address}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_chats_are_those_of_the_server_alone(client, gguf_files):
    model = str(gguf_files())
    bodies = [{"messages": chat, **GREEDY} for chat in CHATS]
    plain = llama_process.run("llama_plain.py", models=[model], bodies=bodies)[model]
    for chat, expected in zip(CHATS, plain, strict=True):
        text = expected["choices"][0]["message"]["content"]
        assert text
        whole = client.chat.completions.create(model="any", messages=chat, **GREEDY)
        assert whole.choices[0].message.content == text
        assert whole.usage.prompt_tokens == expected["usage"]["prompt_tokens"]
        assert whole.usage.completion_tokens == 12
        parts = client.chat.completions.create(model="any", messages=chat, stream=True, **GREEDY)
        deltas = [part.choices[0].delta.content or "" for part in parts if part.choices]
        assert "".join(deltas) == text
        assert len(deltas) > 2


def test_the_model_is_listed_by_its_files_name(client, gguf_files):
    assert [one.id for one in client.models.list()] == [gguf_files().name]


def test_a_wrong_key_is_refused_and_the_right_one_is_in_no_list_of_processes(served):
    with (
        openai.OpenAI(base_url=f"{served.address}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError) as refusal,
    ):
        client.chat.completions.create(model="any", messages=CHATS[0], **GREEDY)
    assert refusal.value.status_code == 401
    assert served.post("/v1/chat/completions", {"messages": CHATS[0]}) == {"status": 401}
    assert KEY not in Path(f"/proc/{served.process.pid}/cmdline").read_text()


def test_the_next_turn_computes_only_what_is_new(client):
    """Also after another conversation."""

    def say(chat: list[dict[str, str]]) -> openai.types.chat.ChatCompletion:
        return client.chat.completions.create(model="any", messages=chat, **GREEDY)

    one = [{"role": "user", "content": "the first of two conversations " * 20}]
    other = [{"role": "user", "content": "something else altogether " * 20}]
    first, _ = say(one), say(other)
    again = [*one, {"role": "assistant", "content": "so it is"}, {"role": "user", "content": "?"}]
    second = say(again)
    new = second.usage.prompt_tokens - second.usage.prompt_tokens_details.cached_tokens
    assert second.usage.prompt_tokens_details.cached_tokens > first.usage.prompt_tokens - 30
    assert second.timings["prompt_n"] == new < 100


def test_it_says_what_it_chose(served):
    said = "\n".join(served.sentences())
    assert f"olmoe-int4.gguf at {served.address}/v1" in said
    assert "its live page at http://127.0.0.1:" in said
    assert "context of 2048 tokens in at most 8.0 MiB" in said
    assert "for experts:" in said


def test_a_signal_ends_it_while_it_answers(client, served):
    stream = client.chat.completions.create(
        model="any", messages=CHATS[0], max_tokens=1900, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    next(iter(stream))
    served.process.send_signal(signal.SIGTERM)
    stream.close()  # else the server waits half a minute for its reader
    assert served.process.wait(20) == 0
    assert "Traceback" not in served.words()


def test_a_name_of_ollamas_is_served_with_flags_of_the_servers_own(gguf_files, tmp_path):
    model, digest = gguf_files("qwen3_moe"), "sha256:" + "a" * 64
    manifest = tmp_path / "manifests" / "registry.ollama.ai" / "library" / "tiny" / "4b"
    manifest.parent.mkdir(parents=True)
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": digest}
    manifest.write_text(json.dumps({"layers": [layer]}))
    blob = tmp_path / "blobs" / digest.replace(":", "-")
    blob.parent.mkdir()
    blob.symlink_to(model)
    memory = model.stat().st_size
    extra = ("-c", "512", "-np", "1", *ONE_KIND_OF_STEP)
    with start(tmp_path / "log", "tiny:4b", memory, *extra, OLLAMA_MODELS=str(tmp_path)) as server:
        (listed,) = server.get("/v1/models")["data"]
        assert (listed["id"], listed["meta"]["n_ctx"]) == ("tiny:4b", 512)
        assert server.get("/props")["total_slots"] == 1
        assert "context of 512 tokens" in server.words()
        assert server.stop(signal.SIGINT) == 0


def test_what_cannot_be_served_is_one_sentence(tmp_path):
    """A dense model, and what only begins like a GGUF file; both at once."""
    writer = gguf.GGUFWriter(tmp_path / "dense.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tmp_path / "blob").write_bytes(b"GGUF" + b"\xff" * 100)
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "flashmoe", "serve", tmp_path / name, "--policy", "lru",
             "--port", str(free_port()), "--page-port", str(free_port())],
            stderr=subprocess.PIPE, text=True, env=os.environ | {"PATH": ""},
        )
        for name in ("dense.gguf", "blob")
    ]  # fmt: skip
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    assert "dense.gguf is no Mixture-of-Experts model (llama)" in errors[0].splitlines()[-1]
    assert "blob is no GGUF file that llama.cpp can read" in errors[1].splitlines()[-1]


def test_what_cannot_be_bound_is_one_sentence_before_anything_is_loaded(
    capfd, gguf_files, monkeypatch
):
    monkeypatch.delenv(serve.KEY_VARIABLE, raising=False)
    model = gguf_files()
    for host in ("0.0.0.0", "::"):
        said = refused(capfd, "serve", model, "--host", host)
        assert "lets other machines in: set FLASHMOE_API_KEY" in said
    assert "--host no.such.host.invalid" in refused(
        capfd, "serve", model, "--host", "no.such.host.invalid"
    )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused(capfd, "serve", model, "--port", port)
        assert f"port {port} of 127.0.0.1 cannot be had" in said
        said = refused(capfd, "serve", model, "--port", free_port(), "--page-port", port)
        assert f"port {port} of 127.0.0.1 cannot be had" in said
    none = refused(capfd, "serve", "no-such:model", "--port", free_port())
    assert "no model that Ollama or LM Studio keep here has this name" in none


def test_a_key_opens_other_hosts(monkeypatch):
    serve.check_host("0.0.0.0", "key")
    serve.check_host("localhost", None)
    serve.check_host("127.8.9.1", None)


@pytest.mark.parametrize("word", ["--host", "--host=0.0.0.0", "--port", "-m", "-hf", "--model-url"])
def test_flags_behind_the_back_of_the_command_are_refused(word):
    with pytest.raises(FlashMoEError, match=rf"leave out {word.split('=')[0]} after --"):
        flags.check_passed(["-np", "1", word, "x"])
    flags.check_passed(["-np", "1", "--hostess"])


def test_the_context_is_what_memory_allows(gguf_files):
    heads = [read_head(tensor_library.find(), gguf_files())]
    # keys and values of 64 numbers for each of 4 heads, in 4 layers
    assert kv_cache.of_token(heads).bytes_at_most == 4 * 4 * (64 + 64) * 2
    assert context_size.choose(heads, 8 << 30).tokens == 2048  # as it was trained
    long = [replace(heads[0], sizes=heads[0].sizes | {"context_length": 131072})]
    room = context_size.choose(long, 512 << 20)
    assert (room.tokens, room.context_bytes, room.prefix_bytes) == (16384, 64 << 20, 32 << 20)
    assert context_size.choose(long, 0).tokens == 4096
    assert context_size.choose(long, 1 << 40).tokens == 131072
    assert context_size.choose(long, 0, 50000).tokens == 50000
    assert context_size.choose(long, 0, 0).tokens == 131072
