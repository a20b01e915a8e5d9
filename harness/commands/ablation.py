"""Print what each feature of `learned` is worth: trained without it, the gap closed."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "what each feature of `learned` is worth"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("traces", type=Path, metavar="TRACES_FOLDER")


def run(arguments: argparse.Namespace) -> None:
    from harness.tables.ablation import print_table

    print_table(arguments.traces)
