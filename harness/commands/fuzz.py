"""Fuzz one kind of input, guided by coverage; `nox -s fuzz` does all kinds.

A crash (anything but FlashMoEError getting out) ends with status 1, and libFuzzer keeps the bytes
that made it in the working directory.
"""

from __future__ import annotations

import argparse

from flashmoe.errors import FlashMoEError
from harness.commands import count

HELP = "one kind of input from anywhere, damaged for so many seconds"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", help="see harness/torture/untrusted.py")
    parser.add_argument("seconds", type=count)


def run(arguments: argparse.Namespace) -> None:
    try:
        from harness.torture.fuzz import fuzz
    except ImportError as error:
        raise FlashMoEError(f"fuzzing needs atheris, `pip install atheris` ({error})") from None
    fuzz(arguments.input, arguments.seconds)
