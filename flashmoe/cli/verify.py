"""Read every byte of a store or a GGUF file and check it."""

from __future__ import annotations

import argparse
from pathlib import Path

from flashmoe import engines

HELP = "check a store or a GGUF file"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="store or GGUF file")


def run(arguments: argparse.Namespace) -> None:
    from flashmoe.util.progress import byte_bar

    with byte_bar("verifying") as progress:
        found = engines.engine_for(arguments.model).verify(arguments.model, progress)
    print(f"{arguments.model}: {found}")
