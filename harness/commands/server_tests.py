"""Run llama.cpp's own tests of its server with FlashMoE under it and without, and compare."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "llama.cpp's own server tests, with FlashMoE and without"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("program", type=Path, help="llama-server, built in llama.cpp's source tree")
    parser.add_argument("--model", type=Path, help="a GGUF file with experts; else a tiny one")
    parser.add_argument("--memory", help="the budget; for --model it is `auto` unless given")
    parser.add_argument("--files", nargs="+", help="of the suite: basic for test_basic.py")


def run(arguments: argparse.Namespace) -> Path:
    from harness.reproduce import folder_for
    from harness.runs.upstream_server_tests import FILES
    from harness.tables.server_tests_table import server_tests_table

    folder = folder_for("quick")
    server_tests_table(
        folder,
        arguments.command_line,
        arguments.program,
        model=arguments.model,
        memory=arguments.memory,
        names=arguments.files or FILES,
    )
    return folder
