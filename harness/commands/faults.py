"""Count what comes of failing drives and of packs that are killed."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.commands import count

HELP = "failing drives and killed packs, counted"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=count, default=1000, help="faults of each kind")
    parser.add_argument("--kills", type=count, default=500)


def run(arguments: argparse.Namespace) -> Path:
    from harness.report import report
    from harness.reproduce import folder_for
    from harness.torture import faults

    folder = folder_for("quick")
    report.write(folder, "faults-reads", faults.reads(arguments.count))
    report.write(folder, "faults-kills", faults.kills(arguments.kills))
    report.record(folder, "faults", arguments.command_line, seed=0)
    return folder
