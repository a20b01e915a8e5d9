"""A conversation, its commands and its status line, against a server of the tests' own."""

from __future__ import annotations

import asyncio
import io
import re
import sys
from contextlib import aclosing

import openai
import openai_server
import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output.vt100 import Size, Vt100_Output

from flashmoe.chat import dialogue
from flashmoe.chat.conversation import Conversation, Piece
from flashmoe.chat.figures import Figures
from flashmoe.chat.plain import Plain
from flashmoe.chat.terminal import Terminal
from flashmoe.errors import FlashMoEError

METRICS = """\
flashmoe_expert_hits_total {}
flashmoe_expert_misses_total {}
flashmoe_read_bytes_total {}
flashmoe_resident_bytes 1048576.0
flashmoe_budget_bytes 2097152.0
"""


@pytest.fixture
def server():
    with openai_server.running() as server:
        yield server


@pytest.fixture
def runner():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture
def talk(server, runner):
    """Makes a Conversation with the server."""
    client = openai.AsyncOpenAI(base_url=server.url, api_key="a key", max_retries=0)
    yield lambda **settings: Conversation(client, "any", **settings)
    runner.run(client.close())


def says(*words):
    return [{"content": word} for word in words]


async def read(answer):
    return "".join([piece.text async for piece in answer])


def roles(request):
    return [(message["role"], message["content"]) for message in request["messages"]]


def test_every_question_brings_what_was_said_before(server, runner, talk):
    server.deltas = [says("Good ", "day"), says("Fine"), says("Who?")]
    conversation = talk(system="Be short", temperature=0.5, seed=4)
    assert runner.run(read(conversation.ask("Hello"))) == "Good day"
    runner.run(read(conversation.ask("And?")))
    conversation.clear()
    runner.run(read(conversation.ask("Again")))
    first, second, third = server.requests
    system, hello = ("system", "Be short"), ("user", "Hello")
    assert roles(first) == [system, hello]
    assert roles(second) == [system, hello, ("assistant", "Good day"), ("user", "And?")]
    assert roles(third) == [system, ("user", "Again")]
    assert (first["temperature"], first["seed"], first["stream"]) == (0.5, 4, True)
    assert "max_tokens" not in first


def test_another_answer_replaces_the_last_one(server, runner, talk):
    server.deltas = [says("one"), says("two"), says("three"), says("four")]
    conversation = talk(seed=9)
    with pytest.raises(FlashMoEError, match="no question yet"):
        conversation.ask_again()
    runner.run(read(conversation.ask("a")))
    runner.run(read(conversation.ask("b")))
    runner.run(read(conversation.ask_again()))
    runner.run(read(conversation.ask_again()))
    assert conversation.turns == [("a", "one"), ("b", "four")]
    assert roles(server.requests[3]) == roles(server.requests[1])
    assert [request["seed"] for request in server.requests] == [9, 9, 10, 11]


def test_a_stopped_answer_ends_the_servers_and_stays_as_far_as_it_came(server, runner, talk):
    server.deltas = [None]
    conversation = talk()

    async def read_two():
        async with aclosing(conversation.ask("Go on")) as answer:
            return [await anext(answer), await anext(answer)]

    runner.run(read_two())
    assert server.hung_up.wait(30)
    assert conversation.turns == [("Go on", "word word ")]


def test_thoughts_are_told_apart_and_not_remembered(server, runner, talk):
    server.deltas = [[{"reasoning_content": "Hm"}, *says("Yes")]]
    conversation = talk()

    async def pieces():
        return [piece async for piece in conversation.ask("Well?")]

    assert runner.run(pieces()) == [Piece("Hm", True), Piece("Yes"), Piece("", tokens=7)]
    assert conversation.turns == [("Well?", "Yes")]


def test_a_refused_question_is_not_remembered_and_can_be_asked_again(server, runner, talk):
    conversation = talk()
    server.refusal = "the prompt is too long"
    with pytest.raises(FlashMoEError, match=r"^the prompt is too long$"):
        runner.run(read(conversation.ask("Hello")))
    assert conversation.turns == []
    server.refusal, server.deltas = None, [says("Hi")]
    runner.run(read(conversation.ask_again()))
    assert conversation.turns == [("Hello", "Hi")]


def test_a_server_that_breaks_off_is_a_sentence(server, runner, talk):
    server.deltas, server.breaks_off = [says("Half")], True
    conversation = talk()
    with pytest.raises(FlashMoEError, match="broke off"):
        runner.run(read(conversation.ask("Hello")))
    assert conversation.turns == [("Hello", "Half")]


def test_lines_of_a_pipe_become_plain_answers(server, runner, talk, monkeypatch, capsys):
    server.deltas = [[{"reasoning_content": "Hm"}, *says("one")], says("two"), says("three")]
    lines = b"first\n\n/clear\n/nonsense\n/regenerate \xff\n  third\n/exit\nnever\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), "utf-8"))
    dialogue.run(talk(), Plain(runner, None), lambda answer: answer, lambda: None)
    out, err = capsys.readouterr()
    assert out == "one\ntwo\nthree\n"
    assert "/nonsense is no command; there are /clear, /regenerate" in err
    assert roles(server.requests[1]) == [("user", "/regenerate \N{REPLACEMENT CHARACTER}")]


def test_a_pipe_ends_where_an_answer_fails(server, runner, talk, monkeypatch):
    server.refusal = "no"
    monkeypatch.setattr(sys, "stdin", io.StringIO("first\nsecond\n"))
    with pytest.raises(FlashMoEError, match="no"):
        dialogue.run(talk(), Plain(runner, None), lambda answer: answer, lambda: None)
    assert len(server.requests) == 1


@pytest.fixture
def keyboard(monkeypatch, tmp_path):
    """Keys for a Terminal, and what it shows."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("TERM", "xterm")
    shown = io.StringIO()
    output = Vt100_Output(shown, lambda: Size(24, 80), enable_cpr=False)
    with create_pipe_input() as keys, create_app_session(keys, output):
        keys.shown = shown
        yield keys


def test_a_terminal_shows_whole_answers_and_keeps_lines(server, runner, talk, keyboard, tmp_path):
    server.deltas = [[{"reasoning_content": "Hm"}, *says("one\ntw", "o\x1b[2J\nthree")]]
    keyboard.send_text("Hello\n/exit\n")
    dialogue.run(talk(), Terminal(runner, lambda: "a status"), lambda answer: answer, lambda: None)
    shown = keyboard.shown.getvalue()
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown)
    places = [plain.rindex(text) for text in ("Hm", "one", "two", "three")]
    assert places == sorted(places)
    assert "a status" in plain
    assert "\x1b[0;2mHm" in shown  # dim
    assert "\x1b[2J" not in shown  # a model commands no terminal
    history = tmp_path / "flashmoe" / "chat-history"
    assert "+Hello\n" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0


def test_ctrl_c_stops_the_answer_and_the_conversation_goes_on(server, runner, talk, keyboard):
    server.deltas = [None, says("Well")]
    conversation = talk()

    async def stopping(answer):
        async with aclosing(answer):
            count = 0
            async for piece in answer:
                yield piece
                count += 1
                if count == 3 and piece.text == "word ":
                    keyboard.send_text("\x03")

    keyboard.send_text("Go on\n")
    screen = Terminal(runner, None)
    line = screen.read()
    screen.show(stopping(conversation.ask(line)))
    assert server.hung_up.wait(30)
    keyboard.send_text("Next\n/exit\n")
    dialogue.run(conversation, screen, lambda answer: answer, lambda: None)
    assert "[stopped]" in keyboard.shown.getvalue()
    (question, text), last = conversation.turns
    assert (question, set(text.split()), last) == ("Go on", {"word"}, ("Next", "Well"))


def figures_of(runner, metrics, pieces):
    async def give():
        for piece in pieces:
            await asyncio.sleep(0.001)
            yield piece

    figures = Figures(metrics)
    before = figures.text()
    runner.run(read(figures.watch(give())))
    return before, figures.text()


def test_the_status_line_tells_what_one_answer_cost(runner):
    pytest.importorskip("prometheus_client")
    counts = iter([(100, 100, 5e6), (190, 110, 5e6 + 2e9)])
    pieces = [Piece("a"), Piece("b"), Piece("", tokens=2)]
    before, text = figures_of(runner, lambda: METRICS.format(*next(counts)), pieces)
    assert before == "no answer yet"
    form = r"[\d.]+ token/s \| hit rate 90.0% \| \d+ MB/s read \| 1.0 MiB of 2.0 MiB"
    assert re.fullmatch(form, text)
    assert float(text.split()[0]) > 0


@pytest.mark.parametrize("metrics", [None, "flashmoe_model_loaded 0.0\n", "<html>"])
def test_without_the_servers_counts_it_tells_the_pace_alone(runner, metrics):
    _, text = figures_of(runner, lambda: metrics, [Piece("a"), Piece("b")])
    assert re.fullmatch(r"[\d.]+ token/s", text)
