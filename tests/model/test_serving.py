"""The server of the transformers engine, asked by OpenAI's own client and by plain HTTP."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import tiny
import torch
import transformers
from huggingface_hub import AsyncInferenceClient, constants

import flashmoe
from flashmoe.engines.serving import ServeSettings
from flashmoe.engines.transformers.prompting import Prompter
from flashmoe.engines.transformers.serving import server as serving
from flashmoe.engines.transformers.serving.model_manager import OneModel

KEY = "a key"
PROMPTS = ["And it came to pass in those days", "The driver must call this function before the"]
CHAT = (
    "{% if tools %}Tools:{% for tool in tools %} {{ tool.function.name }}{% endfor %}"
    "{{ '\n' }}{% endif %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
ANSWER = {  # as families with tool calls have one, so that their way through the server is taken
    "defaults": {"role": "assistant"},
    "start_anchor": "assistant:",
    "fields": {"content": {"close": ["<|endoftext|>"], "content": "text"}},
}
REQUESTS = int(os.environ.get("FLASHMOE_SERVED_REQUESTS", "40"))
CONTEXT = 600
LONG = 500  # tokens of an answer that somebody does not wait for


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The demo model, taught to chat."""
    folder = shutil.copytree(flashmoe.demo_path(), tmp_path_factory.mktemp("served") / "demo-chat")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"chat_template": CHAT, "response_template": ANSWER}
    path.write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def server(folder):
    watched = []
    settings = ServeSettings("127.0.0.1", 0, KEY, "64MiB", "lru", CONTEXT)
    with serving.opened(folder, settings, watched.append) as server:
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        server.engine = watched[0]
        yield server
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def client(server):
    url = f"http://127.0.0.1:{server.port}/v1"
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def plain(folder):
    """What transformers itself continues a text with, greedily: the text, and its tokens."""
    model = tiny.eager(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    known = {}

    def get(text: str, tokens: int) -> str:
        if (text, tokens) not in known:
            ids = tokenizer(text, return_tensors="pt")
            with torch.inference_mode():
                out = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
            known[text, tokens] = tokenizer.decode(out[0, ids["input_ids"].shape[1] :])
        return known[text, tokens]

    get.count = lambda text: len(tokenizer(text)["input_ids"])
    return get


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def chat(client, messages, tokens=8, **more):
    return client.chat.completions.create(
        model="any", messages=messages, max_tokens=tokens, temperature=0, **more
    )


def complete(client, text, tokens=8, **more):
    settings = {"temperature": 0} | more
    return client.completions.create(model="any", prompt=text, max_tokens=tokens, **settings)


def open_stream(server, text, tokens):
    """A connection on which an answer begins to come."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    body = {"prompt": text, "max_tokens": tokens, "stream": True, "temperature": 0}
    headers = {"Authorization": f"Bearer {KEY}"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    return connection


def wait_until_idle(server):
    server.generations._thread.submit(lambda: None).result(timeout=60)


def test_a_completion_is_what_transformers_itself_generates(client, plain):
    answer = complete(client, PROMPTS[0])
    assert answer.choices[0].text == plain(PROMPTS[0], 8)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == plain.count(PROMPTS[0])
    assert answer.usage.completion_tokens == 8


def test_what_transformers_chat_asks_is_answered(server, plain, monkeypatch):
    """In its order: `transformers/cli/chat.py`, of transformers 5.24."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # the library would ask no server
    root = f"http://127.0.0.1:{server.port}"
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    assert urllib.request.urlopen(f"{root}/health").status == 200
    body = json.dumps({"model": "org/any"}).encode()
    request = urllib.request.Request(f"{root}/load_model", body, headers)
    with urllib.request.urlopen(request) as answer:
        events = [json.loads(line[6:]) for line in answer if line.strip()]
    assert events[-1]["status"] == "ready"
    config = transformers.GenerationConfig(max_new_tokens=8, do_sample=False)

    async def converse():
        async with AsyncInferenceClient(base_url=f"{root}/v1", api_key=KEY) as client:
            stream = await client.chat_completion(
                user("Hello"),
                stream=True,
                model="org/any",
                extra_body={"generation_config": config.to_json_string(), "model": "org/any"},
            )
            return [chunk.choices[0] async for chunk in stream if chunk.choices]

    pieces = asyncio.run(converse())
    text = "".join(piece.delta.content or "" for piece in pieces)
    assert text.strip() == plain("user: Hello\nassistant:", 8).strip()
    assert pieces[-1].finish_reason == "length"


def test_a_chat_goes_through_the_models_template_with_its_tools(client, plain):
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {}}}
    answer = chat(client, user("Hello"), tools=[tool])
    written = "Tools: look_up\nuser: Hello\nassistant:"
    assert answer.choices[0].message.content == plain(written, 8).strip()
    assert answer.usage.prompt_tokens == plain.count(written)


@pytest.mark.parametrize("stop", [None, " of the", ["xyz", "tha"]])
def test_a_stream_says_what_an_answer_says_and_ends_before_a_stop_text(client, plain, stop):
    whole = re.split(" of the" if stop == " of the" else "tha", plain(PROMPTS[0], 20))
    expected = whole[0] if stop else plain(PROMPTS[0], 20)
    assert len(whole) > 1
    told = complete(client, PROMPTS[0], 20, stop=stop)
    parts = list(complete(client, PROMPTS[0], 20, stop=stop, stream=True))
    assert told.choices[0].text == expected
    assert "".join(part.choices[0].text for part in parts) == expected
    reason = "stop" if stop else "length"
    assert told.choices[0].finish_reason == parts[-1].choices[0].finish_reason == reason
    assert told.usage.completion_tokens == parts[-1].usage.completion_tokens


def test_a_stop_text_ends_a_chat_too(client, plain):
    expected = plain("user: Hello\nassistant:", 12).strip()
    stop = expected[4:7]
    told = chat(client, user("Hello"), 12, stop=stop)
    parts = list(chat(client, user("Hello"), 12, stop=stop, stream=True))
    before = expected[: expected.index(stop)].strip()
    assert told.choices[0].message.content.strip() == before
    assert "".join(part.choices[0].delta.content or "" for part in parts).strip() == before


def test_a_stream_ends_as_openais_streams_end(server):
    connection = open_stream(server, PROMPTS[0], 3)
    events = connection.getresponse().read().decode().strip().split("\n\n")
    connection.close()
    assert events[-1] == "data: [DONE]"
    assert all(json.loads(event.removeprefix("data: ")) for event in events[:-1])


def test_a_response_is_given_whole_unless_a_stream_is_asked_for(client, plain):
    def ask(**more):
        return client.responses.create(
            model="any", input="Hello", max_output_tokens=8, temperature=0, **more
        )

    expected = plain("user: Hello\nassistant:", 8).strip()
    assert ask().output_text == expected
    assert ask().usage.input_tokens_details.cached_tokens > 0
    assert list(ask(stream=True))[-1].response.output_text.strip() == expected


def test_models_are_the_one_that_is_loaded(client):
    assert [model.id for model in client.models.list()] == ["demo-chat"]
    assert complete(client, PROMPTS[0]).model == "demo-chat"


def test_a_seed_gives_the_same_answer_again(client):
    def ask(seed):
        answer = complete(client, PROMPTS[0], 10, temperature=1.5, seed=seed)
        return answer.choices[0].text

    with ThreadPoolExecutor() as threads:  # seeds do not disturb each other
        texts = list(threads.map(ask, [1, 2, 1, 2]))
    assert texts[:2] == texts[2:]
    assert texts[0] != texts[1]


def test_the_next_turn_computes_only_what_is_new(client, plain):
    talks = [user("In the beginning God"), user("Options: see below")]
    written = ["", ""]
    for _ in range(3):
        for number, talk in enumerate(talks):  # by turns
            earlier = plain.count(written[number])
            written[number] = "".join(f"{m['role']}: {m['content']}\n" for m in talk)
            answer = chat(client, talk)
            text = answer.choices[0].message.content
            assert text == plain(written[number] + "assistant:", 8).strip()
            assert answer.usage.prompt_tokens_details.cached_tokens >= earlier - 1
            talk += [{"role": "assistant", "content": text}, *user("And then?")]


def test_who_has_no_key_is_refused(server):
    for key in ("a", "another"):
        url = f"http://127.0.0.1:{server.port}/v1"
        with (
            openai.OpenAI(base_url=url, api_key=key) as other,
            pytest.raises(openai.AuthenticationError, match="give the server's key"),
        ):
            other.models.list()


def test_a_prompt_that_does_not_fit_is_refused(client):
    with pytest.raises(openai.BadRequestError, match="may have 600: shorten it") as refused:
        complete(client, "a " * CONTEXT)
    assert refused.value.code == "context_length_exceeded"


def test_an_answer_ends_where_the_context_does(client):
    answer = complete(client, "a " * (CONTEXT - 5), 100)
    assert answer.usage.total_tokens == CONTEXT
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("path", "body", "sentence"),
    [
        ("completions", b"{", "not valid JSON"),
        ("completions", b"[]", "a JSON object"),
        ("completions", {"prompt": ""}, "the prompt is empty"),
        ("completions", {"prompt": "a", "max_tokens": 0}, "at least one"),
        ("completions", {"prompt": "a", "temperature": "hot"}, "cannot be read"),
        ("completions", {"prompt": "a", "n": 2}, "leave n out"),
        ("completions", {"prompt": "a", "seed": "x"}, "seed must be"),
        ("completions", {"prompt": "a", "stop": [1]}, "stop must be"),
        ("completions", {"prompt": "a", "foo": 1}, "Unexpected fields"),
        ("chat/completions", {}, "lacks 'messages'"),
        ("chat/completions", {"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "x"}}]}]}, "only text is read"),
    ],
)  # fmt: skip
def test_a_request_that_makes_no_sense_gets_a_sentence(server, path, body, sentence):
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    text = body if isinstance(body, bytes) else json.dumps(body)
    connection.request("POST", f"/v1/{path}", text, {"Authorization": f"Bearer {KEY}"})
    answer = connection.getresponse()
    error = json.loads(answer.read())["error"]
    connection.close()
    assert answer.status in (400, 422)
    assert error["type"] == "invalid_request_error"
    assert sentence in error["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_ends_the_generation(server, stream):
    tokens = 16 * 8  # requests of experts
    before = server.engine.stats()["requests"]
    connection = open_stream(server, PROMPTS[0], LONG)
    if stream:
        connection.getresponse().read(200)
    else:
        time.sleep(0.3)
    connection.close()
    if stream:
        connection.sock = None
    wait_until_idle(server)
    assert server.engine.stats()["requests"] - before < LONG / 2 * tokens


def test_many_clients_get_what_one_gets_though_some_hang_up(server, client, plain):
    def ask(number):
        text = PROMPTS[number % 2]
        if number % 10 == 5:
            connection = open_stream(server, text, LONG)
            connection.getresponse().read(100)
            connection.close()
            return True
        if number % 2:
            parts = complete(client, text, 4, stream=True)
            return "".join(part.choices[0].text for part in parts) == plain(text, 4)
        return complete(client, text, 4).choices[0].text == plain(text, 4)

    def held():
        wait_until_idle(server)
        return threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(ask, range(8)))
        before = held()
        assert all(threads.map(ask, range(REQUESTS)))
        threads_now, files_now = held()
    assert threads_now <= before[0]
    assert files_now <= before[1] + 8  # connections that the client keeps open
    assert server.generations.prefixes.memory_bytes <= server.generations.prefixes.budget_bytes


def test_a_signal_ends_the_server_cleanly_and_tells_its_clients():
    program = (
        "from flashmoe.engines.serving import ServeSettings;"
        "from flashmoe.engines import transformers; import flashmoe, sys;"
        "sys.exit(transformers.serve(flashmoe.demo_path(), ServeSettings("
        "'127.0.0.1', 0, None, '64MiB', 'lru', 1000), lambda engine: print('watched')))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    line = next(line for line in process.stderr if "answers" in line)
    assert "up to 1000 tokens" in line
    connection = http.client.HTTPConnection("127.0.0.1", int(re.search(r":(\d+)/v1", line)[1]))
    for _ in range(100):  # the socket listens a moment later
        try:
            connection.connect()
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
    body = {"prompt": PROMPTS[0], "max_tokens": 900, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body))
    answer = connection.getresponse()
    answer.read(100)
    process.send_signal(signal.SIGTERM)
    assert "the server was told to end" in answer.read().decode()
    connection.close()
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out.strip(), "Traceback" in err) == (0, "watched", False)


def test_a_model_that_cannot_chat_gets_the_messages_as_they_are():
    tokenizer = OneModel(None, Prompter(flashmoe.demo_path())).tokenizer
    talk = [*user("one"), {"role": "assistant", "content": "two"}]
    assert tokenizer.apply_chat_template(talk, tokenize=False) == "one\ntwo"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(port=-1), "cannot listen at 127.0.0.1:-1"),
        (dict(context=5000), "2 to 2048 tokens"),
        (dict(extra=["--n-gpu-layers", "1"]), "unrecognized arguments: --n-gpu-layers"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(settings, sentence):
    given = dict(host="127.0.0.1", port=0, api_key=None, memory="64MiB", policy="lru", context=None)
    with (
        pytest.raises(flashmoe.FlashMoEError, match=sentence),
        serving.opened(flashmoe.demo_path(), ServeSettings(**given | settings), print),
    ):
        pass


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(serving, "find_spec", lambda name: None if name == "uvicorn" else name)
    settings = ServeSettings("127.0.0.1", 0, None, "64MiB", "lru", None)
    with (
        pytest.raises(flashmoe.FlashMoEError, match=r"needs uvicorn: pip install"),
        serving.opened(flashmoe.demo_path(), settings, print),
    ):
        pass
