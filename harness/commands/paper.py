"""The paper's figures beside ours: train its networks, replay, and judge each figure.

Networks are trained for every trace, replay and number of slots, a file a reading. With
`--networks` they are kept, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "the paper's figures beside ours"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--traces", type=Path, help="also every trace of this folder")
    parser.add_argument(
        "--networks", type=Path, metavar="DIR", help="where to keep the trained networks"
    )


def run(arguments: argparse.Namespace) -> Path:
    from harness import reproduce

    folder = reproduce.folder_for("policies" if arguments.traces else "quick")
    reproduce.run_paper(folder, arguments.command_line, arguments.traces, arguments.networks)
    return folder
