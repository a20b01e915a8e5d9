"""How much of its memory Fiddler pins, and what popularity is worth beside chance."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "Fiddler's and DAOP's pinned shares, and popularity beside chance"


def configure(parser: argparse.ArgumentParser) -> None:
    pass


def run(arguments: argparse.Namespace) -> Path:
    import flashmoe
    from flashmoe.engines.transformers.checkpoints.pack import pack
    from harness.progress import say
    from harness.report import report
    from harness.reproduce import folder_for
    from harness.tables import tiers_table

    folder = folder_for("quick")
    with report.scratch(folder) as work:
        pack(flashmoe.demo_path(), work / "demo.store")
        rows = tiers_table.table(work / "demo.store", say)
    report.write(folder, tiers_table.TITLE, rows)
    report.record(folder, tiers_table.TITLE, arguments.command_line, seed=0)
    return folder
