"""Load, generate, resize and close the demo model for hours: does anything grow?"""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.commands import amount

HELP = "does anything grow in hours of use?"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=amount, default=3600)


def run(arguments: argparse.Namespace) -> Path:
    from harness.progress import say
    from harness.report import report
    from harness.reproduce import folder_for
    from harness.torture.soak import soak

    folder = folder_for("quick")
    report.write(folder, "soak", soak(arguments.seconds, say))
    report.record(folder, "soak", arguments.command_line, seed=0)
    return folder
