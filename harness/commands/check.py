"""Replay the committed results and compare them to the last digit; CI runs this."""

from __future__ import annotations

import argparse

HELP = "do the committed results come out of this code?"


def configure(parser: argparse.ArgumentParser) -> None:
    pass


def run(arguments: argparse.Namespace) -> None:
    from harness.check import check

    check()
