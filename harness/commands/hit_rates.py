"""Replay recorded routing through the engine's cache code, under every policy."""

from __future__ import annotations

import argparse
from pathlib import Path

from flashmoe.cli import add_cluster
from flashmoe.util import many_jobs

HELP = "replay recorded routing"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--traces", type=Path, help="also the shipped small models', and every trace of this folder"
    )
    add_cluster(parser)


def run(arguments: argparse.Namespace) -> Path:
    from harness import reproduce

    folder = reproduce.folder_for("policies" if arguments.traces else "quick")
    with many_jobs.on(arguments.cluster):
        reproduce.run_hit_rates(
            folder, arguments.command_line, arguments.traces, timed=not arguments.cluster
        )
    return folder
