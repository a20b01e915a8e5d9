"""Load, ask, resize and close models for hours, of both engines: does anything grow?

With --neighbour they live at memory="auto" beside a program that takes nearly all memory of one
cgroup, again and again: is anything killed?
"""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.commands import amount

HELP = "does anything grow in hours of use?"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=amount, default=3600)
    parser.add_argument("--neighbour", action="store_true", help="memory='auto' in a full cgroup")


def run(arguments: argparse.Namespace) -> Path:
    from harness.progress import say
    from harness.report import report
    from harness.reproduce import folder_for
    from harness.torture import llama_soak, neighbour_soak
    from harness.torture.soak import soak

    folder = folder_for("quick")
    if arguments.neighbour:
        report.write(folder, "soak-neighbour", neighbour_soak.soak(arguments.seconds, say))
        report.record(folder, "soak-neighbour", arguments.command_line, seed=0)
        return folder
    half = arguments.seconds / 2  # an engine
    report.write(folder, "soak", soak(half, say))
    report.write(folder, "soak-llama", llama_soak.soak(half, say))
    report.record(folder, "soak", arguments.command_line, seed=0)
    return folder
