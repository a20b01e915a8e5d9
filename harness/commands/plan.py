"""What `flashmoe plan` would have said of committed rows; what it ships with is fitted to them."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "predicted speeds beside measured ones, of the tables in results/"


def configure(parser: argparse.ArgumentParser) -> None:
    """It has no options: its input is what is committed."""


def run(arguments: argparse.Namespace) -> Path:
    from harness.reproduce import folder_for
    from harness.tables import plan_table

    folder = folder_for("full-scale")
    plan_table.write(folder, arguments.command_line)
    return folder
