"""Count what comes of failing drives, of files that change, of packs and servers killed."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.commands import count

HELP = "failing drives, changed files, killed packs and servers, counted"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=count, default=1000, help="faults of each kind")
    parser.add_argument("--kills", type=count, default=500)


def run(arguments: argparse.Namespace) -> Path:
    from harness.report import report
    from harness.reproduce import folder_for
    from harness.torture import faults, llama_faults

    folder = folder_for("quick")
    report.write(folder, "faults-reads", faults.reads(arguments.count))
    report.write(folder, "faults-kills", faults.kills(arguments.kills))
    some = -(-arguments.count // 10)  # each takes a second or more
    report.write(folder, "faults-llama-reads", llama_faults.reads(arguments.count))
    report.write(folder, "faults-llama-files", llama_faults.changes(some))
    report.write(folder, "faults-llama-kills", llama_faults.kills(some))
    report.record(folder, "faults", arguments.command_line, seed=0)
    return folder
