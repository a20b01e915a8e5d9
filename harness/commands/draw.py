"""Draw a page with all pictures for each folder of results, from its CSV files."""

from __future__ import annotations

import argparse
from pathlib import Path

from flashmoe.errors import FlashMoEError

HELP = "pages and pictures out of the tables in results/"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders", nargs="*", type=Path, metavar="FOLDER", help="default: every one of results/"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: FOLDER/pages, not in git")
    parser.add_argument(
        "--figures", action="store_true", help="instead, the pictures that README and docs show"
    )


def run(arguments: argparse.Namespace) -> None:
    from harness.report import figures, index, pages, report

    if arguments.figures:
        if arguments.folders or arguments.out:
            raise FlashMoEError("--figures draws into results/: give no FOLDER and no --out")
        for path in figures.draw():
            print(path)
        return
    for folder in arguments.folders or report.folders():
        print(pages.draw(folder, arguments.out and arguments.out / folder.resolve().name))
    if not arguments.out:
        index.write()
