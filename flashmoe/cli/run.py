"""Run a program of llama.cpp whose model's experts stay on the SSD; its own arguments follow."""

from __future__ import annotations

import argparse
import json
import sys
import threading
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from flashmoe.cli import add_also, add_memory, end
from flashmoe.disk import files
from flashmoe.errors import FlashMoEError

HELP = "run llama-server or another program of llama.cpp"


def seconds(text: str) -> float:
    """The type of --stats-every. Raises ValueError for a time that nobody can wait."""
    if not 0 < (number := float(text)) <= threading.TIMEOUT_MAX:
        raise ValueError
    return number


def configure(parser: argparse.ArgumentParser) -> None:
    add_memory(parser)
    add_also(parser)
    parser.add_argument("--policy", default="learned", help="see `flashmoe policies`")
    parser.add_argument(
        "--warm", type=Path, metavar="FILE", help="begin as the last run ended; then keep this run"
    )
    parser.add_argument(
        "--record", type=Path, metavar="TRACE.npz", help="write which experts the model chose"
    )
    parser.add_argument("--stats", action="store_true", help="print the counts at the end, as JSON")
    parser.add_argument(
        "--stats-every", type=seconds, metavar="SECONDS",
        help="print them to stderr while the program runs, each time as one line of JSON",
    )  # fmt: skip
    parser.add_argument("program", help="llama-server, llama-cli, llama-bench, ... or its path")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the program's own")


def run(arguments: argparse.Namespace) -> None:
    try:
        from flashmoe.engines.llama.attachment import Attachment
    except ImportError as error:
        raise FlashMoEError(
            f"{error.name} is not installed: pip install 'flashmoe-ssd[run]'"
        ) from None
    from flashmoe.engines.base import Engine
    from flashmoe.engines.llama.hosts import flags, program
    from flashmoe.engines.telemetry import StatsLines
    from flashmoe.residency import warm_start

    flags.check(Path(arguments.program).name, arguments.arguments)
    if arguments.record and arguments.record.suffix != ".npz":
        raise FlashMoEError(f"--record {arguments.record} must end in .npz")
    for path in filter(None, (arguments.warm, arguments.record)):
        files.check_replaceable(path)
    library = program.find(arguments.program)
    engines: list[Engine] = []
    attach = partial(
        Attachment,
        memory=arguments.memory,
        policy=arguments.policy,
        warm=arguments.warm,
        record=bool(arguments.record),
        watch=engines.append,
        also=arguments.also,
    )
    every = arguments.stats_every
    with StatsLines(every, lambda: next(iter(engines), None)) if every else nullcontext():
        status = program.run(library, arguments.arguments, attach)
    for engine in engines:
        if arguments.warm:
            warm_start.save(engine.residency, arguments.warm)
        if arguments.stats:
            print(json.dumps(engine.stats()), file=sys.stderr)
        if arguments.record:
            trace = engine.trace(source="flashmoe run")  # type: ignore[attr-defined]
            trace.save(arguments.record)
    if arguments.record and not engines:
        print(
            f"flashmoe: {arguments.record} is not written: no expert was asked for",
            file=sys.stderr,
        )
    end(status)
