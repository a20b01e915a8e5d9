"""What a policy's decisions cost where a model has many experts."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "what decisions cost where a model has many experts"


def configure(parser: argparse.ArgumentParser) -> None:
    pass


def run(arguments: argparse.Namespace) -> Path:
    from harness import reproduce
    from harness.report import report
    from harness.tables import policy_scale

    folder = reproduce.folder_for("policies")
    report.write(folder, "policy_scale", policy_scale.table())
    report.record(folder, "policy_scale", arguments.command_line, seed=0)
    return folder
