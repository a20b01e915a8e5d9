"""Replay the committed results and compare them to the last digit (CI runs this), or compare
the ratios of this machine's results with another machine's."""

from __future__ import annotations

import argparse
from pathlib import Path

from flashmoe.errors import FlashMoEError
from harness.commands import amount

HELP = "do the committed results come out of this code, or another machine's ratios here?"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--against", type=Path, metavar="FOLDER",
        help="instead: which ratios of another machine's folder of results come out on this one",
    )  # fmt: skip
    parser.add_argument(
        "--mine", type=Path, metavar="FOLDER",
        help="with --against: of which machine; default: this one's folder of the same profile",
    )  # fmt: skip
    parser.add_argument(
        "--widen", type=amount, metavar="SHARE",
        help="with --against: of either end of a range of speeds; default: 0.25",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    if arguments.against is None:
        if arguments.mine or arguments.widen:
            raise FlashMoEError("--mine and --widen go with --against FOLDER: give it too")
        from harness.check import check

        check()
        return
    from harness.report import against

    print(against.text(_mine(arguments), arguments.against, arguments.widen or against.WIDEN))


def _mine(arguments: argparse.Namespace) -> Path:
    """Of the profile that the other folder's name ends with."""
    if arguments.mine:
        return Path(arguments.mine)
    from harness.report import provenance, report

    if not (arguments.against / report.RECORDS).is_file():
        raise FlashMoEError(f"{arguments.against} has no {report.RECORDS}: no results lie there")
    profile = arguments.against.resolve().name.rpartition("gib-")[2]
    folder = report.RESULTS / f"{provenance.machine_slug()}-{profile}"
    if not (folder / report.RECORDS).is_file():
        raise FlashMoEError(
            f"this machine has no results in {folder.name}: make them by the commands in "
            f"{arguments.against / report.RECORDS}, or name other ones by --mine FOLDER"
        )
    return folder
