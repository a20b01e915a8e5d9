"""Run every system under memory caps, on a model small enough for it to take minutes."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "every system under memory caps, in minutes"


def configure(parser: argparse.ArgumentParser) -> None:
    pass


def run(arguments: argparse.Namespace) -> Path:
    from harness import reproduce

    folder = reproduce.folder_for("quick")
    reproduce.run_speedups(folder, arguments.command_line)
    return folder
