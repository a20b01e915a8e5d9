"""Measure what experts bring that are read as they were published, in fewer bits."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.commands import amount, count

HELP = "what experts bring that are read as they were published"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="gpt-oss-20b")
    parser.add_argument("--format", default="mxfp4", help="mxfp4 or fp8")
    parser.add_argument("--stores", type=Path, help="keep the stores in this directory")
    parser.add_argument("--rounds", type=count, default=2)
    parser.add_argument("--shares", type=amount, nargs="+", help="of the experts' published bytes")


def run(arguments: argparse.Namespace) -> Path:
    from harness.reproduce import folder_for
    from harness.tables import published_table

    folder = folder_for("full-scale")
    published_table.speed(
        folder,
        arguments.command_line,
        arguments.model,
        arguments.format,
        shares=arguments.shares or published_table.SHARES,
        rounds=arguments.rounds,
        stores=arguments.stores,
    )
    return folder
