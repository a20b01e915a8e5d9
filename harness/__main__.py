"""The referee: measure the drive, replay routing, run systems, check committed results."""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import signal
import sys
from collections.abc import Sequence

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from flashmoe.errors import FlashMoEError
from harness import commands


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m harness", description=__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for info in pkgutil.iter_modules(commands.__path__):
        module = importlib.import_module(f"{commands.__name__}.{info.name}")
        name = info.name.replace("_", "-")
        command = subparsers.add_parser(name, help=module.HELP, description=module.__doc__)
        module.configure(command)
        command.set_defaults(run=module.run)
    return parser


def main(words: Sequence[str] | None = None) -> None:
    """Run a command; where it wrote tables, refresh the index and the page of all results."""
    words = sys.argv[1:] if words is None else words
    parsed = build_parser().parse_args(words)
    parsed.command_line = commands.command_line(words, parsed)
    if parsed.run(parsed):
        from harness.report import index
        from harness.report.page import build

        index.write()
        build.write()


def _stop(*_: object) -> None:
    raise KeyboardInterrupt  # so that cgroups, processes and scratch files go as on Ctrl-C


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    try:
        main()
    except FlashMoEError as error:
        sys.exit(f"harness: {error}")
    except KeyboardInterrupt:
        sys.exit("harness: interrupted")
