"""The project's main job: from nothing to all tables of this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "everything, into results/"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--profile", choices=("quick", "desktop"), default="quick")


def run(arguments: argparse.Namespace) -> Path:
    from harness.reproduce import reproduce

    return reproduce(arguments.profile, arguments.command_line)
