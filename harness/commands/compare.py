"""Compare every engine that runs models beyond memory, ours or not, in one table."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from harness.commands import add_engine, amount, count

HELP = "every engine, ours or not, on the same weights in one table"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help="whose shapes and routing")
    parser.add_argument(
        "--weights", nargs="+", default=["bf16"], help="of bf16, int8, int4 and mxfp4"
    )
    parser.add_argument("--caps", type=amount, nargs="+", help="shares of the model's bf16 size")
    parser.add_argument("--prompts", type=count, nargs="+", help="tokens (default: 160 2000)")
    parser.add_argument("--rounds", type=count, default=2)
    parser.add_argument("--systems", nargs="+", default=[], help="by the names of a table's rows")
    add_engine(parser)
    parser.add_argument(
        "--programs", type=Path, default=os.environ.get("FLASHMOE_LLAMA_BIN"),
        help="a folder with llama.cpp's programs (default: FLASHMOE_LLAMA_BIN)",
    )  # fmt: skip
    parser.add_argument("--stores", type=Path, help="keep the files in this directory")
    parser.add_argument("--label", help="goes into the table's name")


def run(arguments: argparse.Namespace) -> Path:
    from harness.progress import say
    from harness.reproduce import folder_for
    from harness.runs import contenders
    from harness.runs.memory_cap import require_limits
    from harness.tables import compare

    programs = arguments.programs and Path(arguments.programs)
    known, reasons = contenders.available(programs, arguments.engine)
    for reason in reasons:
        say(reason)
    options = {
        name: value
        for name in ("weights", "caps", "prompts", "rounds", "stores", "label")
        if (value := getattr(arguments, name))
    }
    chosen = compare.choose(arguments.systems, known)
    plans = [compare.Plan(model, chosen, **options) for model in arguments.models]
    require_limits()
    folder = folder_for("full-scale")
    for plan in plans:
        compare.compare(folder, arguments.command_line, plan)
    return folder
