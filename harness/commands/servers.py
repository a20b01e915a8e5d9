"""Measure llama-server with FlashMoE under it and without, and rivals, on the same GGUF file."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.commands import add_engine, amount, count

HELP = "llama-server with FlashMoE under it and without"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("program", type=Path, help="llama-server of a build in shared libraries")
    parser.add_argument("--model", default="olmoe-1b-7b", help="whose shapes and routing")
    parser.add_argument("--stores", type=Path, help="keep the GGUF file in this directory")
    parser.add_argument("--caps", type=amount, nargs="+", help="shares of the file's size")
    parser.add_argument("--rounds", type=count, default=1)
    parser.add_argument("--systems", nargs="+", default=[], help="by the names of a table's rows")
    add_engine(parser)
    parser.add_argument(
        "--quant", default="int4", help="as `flashmoe synth --quant`, or int4: Q4_0"
    )
    parser.add_argument(
        "--repeating",
        action="store_true",
        help="a prompt that holds the answer: for guessed tokens",
    )


def run(arguments: argparse.Namespace) -> Path:
    from harness.reproduce import folder_for
    from harness.runs.memory_cap import require_limits
    from harness.tables.server_table import CAPS, server_table

    require_limits()
    folder = folder_for("full-scale")
    server_table(
        folder,
        arguments.command_line,
        arguments.model,
        arguments.program,
        caps=arguments.caps or CAPS,
        rounds=arguments.rounds,
        scheme=arguments.quant,
        stores=arguments.stores,
        systems=arguments.systems,
        engines=arguments.engine,
        repeating=arguments.repeating,
    )
    return folder
