"""Measure what a second drive is worth: two loop devices, each limited alike. Needs root."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "measure reads spread over two drives, and the loss of one"


def configure(parser: argparse.ArgumentParser) -> None:
    pass


def run(arguments: argparse.Namespace) -> Path:
    from harness.progress import say
    from harness.report import report
    from harness.reproduce import folder_for
    from harness.tables import drives_table

    folder = folder_for("full-scale")
    with report.scratch(folder) as work:
        rows = drives_table.table(work, say)
    report.write(folder, "drives", rows)
    report.record(folder, "drives", arguments.command_line, seed=0)
    return folder
