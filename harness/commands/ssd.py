"""Measure the drive by fio and by the engine's own reader, in turn on one file."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "measure the drive by fio and by the engine's reader"


def configure(parser: argparse.ArgumentParser) -> None:
    pass


def run(arguments: argparse.Namespace) -> Path:
    from harness import reproduce

    folder = reproduce.folder_for("quick")
    reproduce.run_ssd(folder, arguments.command_line)
    return folder
