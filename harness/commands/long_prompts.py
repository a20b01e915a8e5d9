"""Measure what a prompt of up to 32k tokens takes in memory beside the budget."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "what a prompt of 32k tokens takes beside the budget"


def configure(parser: argparse.ArgumentParser) -> None:
    pass


def run(arguments: argparse.Namespace) -> Path:
    from harness.report import report
    from harness.reproduce import folder_for
    from harness.tables import long_prompts

    folder = folder_for("quick")
    report.write(folder, "long_prompts", long_prompts.table())
    report.record(folder, "long_prompts", arguments.command_line, seed=0)
    return folder
