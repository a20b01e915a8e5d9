"""Serve a model over HTTP, as OpenAI's clients expect; its experts stay on the SSD."""

from __future__ import annotations

import argparse
import ipaddress
import os
import socket
import sys
from functools import partial
from pathlib import Path

import flashmoe
from flashmoe import engines
from flashmoe.cli import add_also, add_memory, end
from flashmoe.engines import hub
from flashmoe.errors import FlashMoEError

HELP = "serve a model to OpenAI's clients, with a live page of its cache"
KEY_VARIABLE = "FLASHMOE_API_KEY"


def port(text: str) -> int:
    """The type of --port. Raises ValueError for a number that no port has."""
    if not 0 < (number := int(text)) < 1 << 16:
        raise ValueError
    return number


def tokens(text: str) -> int:
    """The type of --context, as a number of tokens. Raises ValueError for less than one token."""
    if not 0 < (number := int(text)) < 1 << 31:
        raise ValueError
    return number


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add MODEL and how it runs, the same for every command that serves one."""
    parser.add_argument(
        "model",
        nargs="?",
        type=Path,
        help="GGUF file, Hugging Face directory, store, or a name on the hub, of Ollama's or of "
        "LM Studio's (default: the demo)",
    )
    add_memory(parser)
    parser.add_argument("--policy", default="learned", help="see `flashmoe policies`")
    parser.add_argument(
        "--context", type=tokens, metavar="TOKENS", help="default: what fits this machine"
    )


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [options] [MODEL] [-- FLAGS of llama-server]"
    add_model(parser)
    add_also(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="another needs a key (default: %(default)s)"
    )
    parser.add_argument("--port", type=port, default=8080, help="(default: %(default)s)")
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"what requests must carry (default: the variable {KEY_VARIABLE}, which no list of "
        "processes shows)",
    )
    parser.add_argument(
        "--page-port", type=port, help="of the live page and /metrics (default: the next port)"
    )


def run(arguments: argparse.Namespace) -> None:
    from flashmoe.engines.serving import ServeSettings
    from flashmoe.monitor import Monitor

    host, api_key = arguments.host, arguments.api_key or os.environ.get(KEY_VARIABLE) or None
    page_port = arguments.page_port or arguments.port + 1
    check_host(host, api_key)
    for one in (arguments.port, page_port):
        check_free(host, one)
    path = hub.on_disk(arguments.model) if arguments.model else flashmoe.demo_path()
    if not path.exists():
        raise FlashMoEError(
            f"{path}: no file is there, and no model that Ollama or LM Studio keep here has this "
            "name: give a path, or org/name on the hub"
        )
    settings = ServeSettings(
        host=host,
        port=arguments.port,
        api_key=api_key,
        memory=arguments.memory,
        policy=arguments.policy,
        context=arguments.context,
        extra=arguments.passed,
        also=arguments.also,
        name=_name(arguments.model, path),
    )
    with Monitor(host, page_port, api_key) as monitor:
        print(
            f"flashmoe: {arguments.model or 'the demo model'} at {address(host, settings.port)}/v1 "
            f"once it is loaded, its live page at {address(host, page_port)}; memory for experts: "
            f"{settings.memory}",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        watch = partial(monitor.watch, name=settings.name or path.name)
        status = engines.engine_for(path).serve(path, settings, watch)
    end(status)


def _name(model: Path | None, path: Path) -> str | None:
    """What the user calls the model that lies at `path`; None where that is its path."""
    if model is None:
        return "demo"
    return str(model) if model != path else None


def check_host(host: str, api_key: str | None) -> None:
    """Raises FlashMoEError for a host that is not this machine's, or others reach without a key."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise FlashMoEError(f"--host {host}: {error.strerror or error}") from None
    is_loopback = all(ipaddress.ip_address(one[4][0]).is_loopback for one in found)
    if not is_loopback and api_key is None:
        raise FlashMoEError(
            f"--host {host!r} lets other machines in: set {KEY_VARIABLE} (or --api-key) to what "
            "their requests must carry"
        )


def check_free(host: str, number: int) -> None:
    """Raises FlashMoEError where this port cannot be had."""
    family, kind, *_, place = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
    try:
        with socket.socket(family, kind) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(place)
            one.listen()
    except OSError as error:
        raise FlashMoEError(
            f"port {number} of {host} cannot be had ({error.strerror}): choose others by --port "
            "and --page-port"
        ) from None


def address(host: str, number: int) -> str:
    """For a browser on this machine."""
    return f"http://{f'[{host}]' if ':' in host else host}:{number}"
