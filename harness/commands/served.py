"""Measure `flashmoe serve`: a crowd of clients, a second turn, decode beside plain generation."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.commands import count

HELP = "flashmoe serve beside plain generation"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", type=Path, help="default: the demo")
    parser.add_argument("--bench", type=Path, help="llama-bench, for a GGUF file")
    parser.add_argument("--rounds", type=count, default=5)


def run(arguments: argparse.Namespace) -> Path:
    from harness.reproduce import folder_for
    from harness.tables.served_table import served_table

    folder = folder_for("quick")
    served_table(folder, arguments.command_line, arguments.model, arguments.bench, arguments.rounds)
    return folder
