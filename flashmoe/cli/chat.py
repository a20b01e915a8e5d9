"""Talk with a model in the terminal; a server of its own runs it, and ends with the chat."""

from __future__ import annotations

import argparse
import asyncio
import sys

from flashmoe.chat.dialogue import COMMANDS
from flashmoe.cli import seed
from flashmoe.cli.serve import add_model, tokens
from flashmoe.errors import FlashMoEError

HELP = "talk with a model in the terminal"


def temperature(text: str) -> float:
    """The type of --temperature. Raises ValueError for what no sampler takes."""
    if not 0 <= (number := float(text)) <= 100:
        raise ValueError
    return number


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [options] [MODEL] [-- FLAGS of the server]"
    parser.epilog = (
        "Ctrl-C stops an answer, Alt-Enter begins a new line. "
        + "; ".join(f"{name} {what}" for name, what in COMMANDS.items())
        + ". Without a terminal, each line of standard input is a question, and only answers are "
        "printed."
    )
    add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before all else")
    parser.add_argument("--temperature", type=temperature, help="0: always the likeliest token")
    parser.add_argument(
        "--seed", type=seed, help="of sampling: the same answers again; /regenerate takes the next"
    )
    parser.add_argument("--max-tokens", type=tokens, metavar="TOKENS", help="of an answer, at most")
    parser.add_argument(
        "--stats", action="store_true",
        help="a status line of the last answer: its speed, the cache's hit rate, reads, memory",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    try:
        import openai

        from flashmoe.chat import dialogue
        from flashmoe.chat.conversation import Conversation
        from flashmoe.chat.figures import Figures
        from flashmoe.chat.plain import Plain
        from flashmoe.chat.server_process import ServerProcess
        from flashmoe.chat.terminal import Terminal
    except ImportError as error:
        raise FlashMoEError(
            f"{error.name} is not installed: pip install 'flashmoe-ssd[chat]'"
        ) from None
    from flashmoe.util.progress import status_line

    sits_there = all(stream and stream.isatty() for stream in (sys.stdin, sys.stdout))
    with ServerProcess(_serve_arguments(arguments)) as server, asyncio.Runner() as runner:
        with status_line() as show:
            server.wait_until_ready(show)
        client = openai.AsyncOpenAI(
            base_url=server.url, api_key=server.api_key, max_retries=0, timeout=None,
            http_client=openai.DefaultAsyncHttpxClient(trust_env=False),  # proxies are for others
        )  # fmt: skip
        conversation = Conversation(
            client, str(arguments.model or "demo"), arguments.system, arguments.seed,
            temperature=arguments.temperature, max_tokens=arguments.max_tokens,
        )  # fmt: skip
        figures = Figures(server.metrics)
        kind = Terminal if sits_there else Plain
        screen = kind(runner, figures.text if arguments.stats else None)
        try:
            watch = figures.watch if arguments.stats else lambda answer: answer
            dialogue.run(conversation, screen, watch, server.check)
        finally:
            runner.run(client.close())


def _serve_arguments(arguments: argparse.Namespace) -> list[str]:
    """What the server is told as this command was."""
    options = [f"--memory={arguments.memory}", f"--policy={arguments.policy}"]
    if arguments.context:
        options.append(f"--context={arguments.context}")
    model = [str(arguments.model)] if arguments.model else []
    passed = ["--", *arguments.passed] if arguments.passed else []
    return [*options, *model, *passed]
