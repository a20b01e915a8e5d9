"""The `flashmoe` command. Each module here is one subcommand: `HELP`, `configure` and `run`."""

from __future__ import annotations

import argparse
import ctypes
import importlib
import io
import logging
import os
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from flashmoe.errors import FlashMoEError


def add_memory(parser: argparse.ArgumentParser) -> None:
    """Add --memory, the same for every command that runs a model."""
    parser.add_argument(
        "--memory",
        default="auto",
        help="budget for experts, such as 4GiB (default: auto, what the machine has free)",
    )


def add_also(parser: argparse.ArgumentParser) -> None:
    """Add --also, the same for every command that reads a model from several drives."""
    parser.add_argument(
        "--also",
        type=Path,
        action="append",
        default=[],
        metavar="COPY",
        help="the same model once more, on another drive: reads are spread over both; may be "
        "given again",
    )


def add_cluster(parser: argparse.ArgumentParser) -> None:
    """Add --cluster, the same for every command that replays or trains."""
    parser.add_argument(
        "--cluster",
        metavar="ADDRESS",
        help="a Dask or Ray cluster to compute on, dask://HOST:PORT or ray://HOST:PORT "
        "(default: this machine's cores)",
    )


def parser() -> argparse.ArgumentParser:
    """The parser of `flashmoe`, with a subcommand for each module of this package."""
    top = argparse.ArgumentParser(
        prog="flashmoe", description="Run Mixture-of-Experts models whose experts stay on the SSD."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        name = info.name.replace("_", "-")
        command = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        module.configure(command)
        command.set_defaults(run=module.run)
    return top


def seed(text: str) -> int:
    """The type of --seed. Raises ValueError outside 0..2**63-1, which every generator takes."""
    if not 0 <= (number := int(text)) < 1 << 63:
        raise ValueError
    return number


def end(status: int) -> NoReturn:
    """End the process as the program would that ran in it: its threads, its buffers."""
    sys.stdout.flush()
    sys.stderr.flush()
    ctypes.CDLL(None).exit(status)  # not sys.exit, which takes Python from under them first
    raise AssertionError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; return its exit status. A FlashMoEError becomes a sentence and status 1."""
    logging.basicConfig(format="flashmoe: %(message)s", level=logging.WARNING)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    words, passed = _split(sys.argv[1:] if arguments is None else list(arguments))
    parsed = parser().parse_args(words)
    parsed.passed = passed
    try:
        parsed.run(parsed)
    except FlashMoEError as error:
        print(f"flashmoe: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("flashmoe: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output ended first, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """The command's own words, and those after -- where it passes them on to another program."""
    if words[:1] in (["chat"], ["serve"]) and "--" in words:  # argparse takes them for a MODEL
        place = words.index("--")
        return words[:place], words[place + 1 :]
    return words, []


def entry() -> None:
    """The console script: `main`, on an output that prints whatever the terminal cannot encode."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # it is None where it is closed
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())
