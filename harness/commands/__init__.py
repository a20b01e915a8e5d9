"""The commands. Each module here is one: `HELP`, `configure(parser)` and `run(arguments)`.

`run` gives back the folder under results/ whose tables it wrote, or None. Modules import what is
heavy inside `run`: `python -m harness run` may have little memory.
"""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path


def _above_zero(kind: Callable[[str], float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} is not above zero")
        if value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} has no end")
        return value

    parse.__name__ = kind.__name__  # which argparse names where `kind` itself refuses
    return parse


count, amount = _above_zero(int), _above_zero(float)


def add_engine(parser: argparse.ArgumentParser) -> None:
    """The option by which users' own engines come into a table, as a list `engine`."""
    parser.add_argument(
        "--engine", action="append", default=[], metavar="NAME='COMMAND ...'",
        help="one of your own beside them (docs/engines.md); repeatable",
    )  # fmt: skip


def command_line(words: Sequence[str], parsed: argparse.Namespace) -> str:
    """The command as it was given, for provenance.

    A path shows as DIR, a trace as TRACE, a cluster as ADDRESS, what runs an engine as COMMAND.
    """
    engines = getattr(parsed, "engine", None) or ()
    paths = set(_paths(parsed))
    cluster = getattr(parsed, "cluster", None)

    def mask(word: str) -> str:
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if cluster and value == cluster:
            return option + equals + "ADDRESS"
        if value in engines:
            return option + equals + value.partition("=")[0] + "=COMMAND"
        path = Path(value)
        if path not in paths or not value:
            return word
        return option + equals + ("TRACE" if path.suffix == ".npz" else "DIR")

    return shlex.join(["python", "-m", "harness", *map(mask, words)])


def _paths(parsed: argparse.Namespace) -> Iterator[Path]:
    for value in vars(parsed).values():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, Path):
                yield each
