"""How much of LRU's gap to Belady can be known: a large predictor, trained on the model itself.

Of each trace of a folder, on the sequences that the hit-rate tables do not hold out. Half an hour
on 2 cores for a trace of 90,000 tokens.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.commands import count

HELP = "what a large offline predictor makes of the routing"
EPOCHS = 12


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("traces", type=Path, help="folder of recorded routing")
    parser.add_argument("--epochs", type=count, default=EPOCHS)


def run(arguments: argparse.Namespace) -> Path:
    from harness import reproduce
    from harness.progress import say
    from harness.report import report
    from harness.tables import ceiling_table

    folder = reproduce.folder_for("policies")
    rows = ceiling_table.table(arguments.traces, arguments.epochs, say)
    report.write(folder, "ceiling", rows)
    report.record(folder, "ceiling", arguments.command_line, seed=0)
    return folder
