"""Measure where a token's time goes, on the demo model."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "where a token's time goes, on the demo model"


def configure(parser: argparse.ArgumentParser) -> None:
    pass


def run(arguments: argparse.Namespace) -> Path:
    from harness import reproduce

    folder = reproduce.folder_for("quick")
    reproduce.run_generation(folder, arguments.command_line)
    return folder
