"""Measure what quantised experts bring in speed, or cost in quality."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.commands import count

HELP = "what quantised experts bring and cost"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="olmoe-1b-7b")
    parser.add_argument("--stores", type=Path, help="keep the stores in this directory")
    parser.add_argument("--rounds", type=count, default=2)
    parser.add_argument("--texts", type=Path, help="measure quality instead, on texts fetched here")


def run(arguments: argparse.Namespace) -> Path:
    from harness.reproduce import folder_for
    from harness.tables import quant_table

    folder = folder_for("full-scale")
    if arguments.texts:
        quant_table.perplexities(folder, arguments.command_line, arguments.texts)
    else:
        quant_table.speed(
            folder,
            arguments.command_line,
            arguments.model,
            rounds=arguments.rounds,
            stores=arguments.stores,
        )
    return folder
