"""Build results/index.html, the one page of all results, from what lies under results/."""

from __future__ import annotations

import argparse

HELP = "the page of all results, results/index.html"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pictures", action="store_true", help="also the pictures that README and docs show"
    )


def run(arguments: argparse.Namespace) -> None:
    from harness.report import index, pictures
    from harness.report.page import build

    if arguments.pictures:
        for path in pictures.draw():
            print(path)
    index.write()
    print(build.write())
