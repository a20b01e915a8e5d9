"""Measure against engines that are not ours, on the same weights and routing."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.commands import amount, count

HELP = "the table against llama.cpp"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="olmoe-1b-7b")
    parser.add_argument("--stores", type=Path, help="keep store and GGUF file in this directory")
    parser.add_argument("--caps", type=amount, nargs="+", help="shares of the model's size")
    parser.add_argument("--rounds", type=count, default=2)
    parser.add_argument("--quant", default="none", help="int8 or int4: llama.cpp's Q8_0, Q4_0")


def run(arguments: argparse.Namespace) -> Path:
    from harness.reproduce import folder_for
    from harness.tables.full_scale import CAPS
    from harness.tables.peer_table import peer_table

    folder = folder_for("full-scale")
    peer_table(
        folder,
        arguments.command_line,
        arguments.model,
        caps=arguments.caps or CAPS,
        rounds=arguments.rounds,
        stores=arguments.stores,
        scheme=arguments.quant,
    )
    return folder
