"""Print what each feature of `learned` is worth: trained without it, the gap closed."""

from __future__ import annotations

import argparse
from pathlib import Path

from flashmoe.cli import add_cluster
from flashmoe.util import many_jobs

HELP = "what each feature of `learned` is worth"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("traces", type=Path, metavar="TRACES_FOLDER")
    add_cluster(parser)


def run(arguments: argparse.Namespace) -> None:
    from harness.tables.ablation import print_table

    with many_jobs.on(arguments.cluster):
        print_table(arguments.traces)
