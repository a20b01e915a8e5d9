"""Measure this machine in minutes for results/datapoints/, or check such files."""

from __future__ import annotations

import argparse
from pathlib import Path

from flashmoe.errors import FlashMoEError
from harness.commands import amount

HELP = "this machine as one small file, in at most 15 minutes"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--check", nargs="*", type=Path, metavar="FILE", help="instead: refuse what cannot be; "
        "default: all of results/datapoints/",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="where the file goes, on the drive that is measured; default: results/datapoints/",
    )  # fmt: skip
    parser.add_argument("--minutes", type=amount, help="that it may take; default: 15")


def run(arguments: argparse.Namespace) -> None:
    from harness.datapoints import check, files

    if arguments.check is not None:
        if arguments.out or arguments.minutes:
            raise FlashMoEError("--check measures nothing: give no --out and no --minutes")
        paths = arguments.check or files.committed()
        check.check(paths)
        print(f"{len(paths)} datapoints are well-formed and possible")
        return
    from harness.datapoints import measure

    if arguments.out and arguments.out.exists() and not arguments.out.is_dir():
        raise FlashMoEError(f"{arguments.out} is a file: name a folder by --out")
    minutes = arguments.minutes or measure.MINUTES
    print(measure.measure(arguments.command_line, arguments.out or files.folder(), minutes))
