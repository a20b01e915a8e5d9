"""Hold the engine to transformers on damaged checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.commands import count

HELP = "damaged checkpoints against transformers"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=count, default=1000)
    parser.add_argument("--seed", type=int, default=0)


def run(arguments: argparse.Namespace) -> Path:
    from harness.progress import say
    from harness.report import report
    from harness.reproduce import folder_for
    from harness.torture import mutants

    folder = folder_for("quick")
    rows = mutants.examine(arguments.count, arguments.seed, say)
    report.write(folder, "mutations", rows)
    report.record(folder, "mutations", arguments.command_line, seed=arguments.seed)
    return folder
