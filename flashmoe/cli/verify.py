"""Read every byte of a store or a GGUF file and check it."""

from __future__ import annotations

import argparse
from pathlib import Path

from flashmoe import engines
from flashmoe.cli import add_also
from flashmoe.engines import hub

HELP = "check a store or a GGUF file"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="store, GGUF file, or a name of one")
    add_also(parser)


def run(arguments: argparse.Namespace) -> None:
    from flashmoe.util.progress import byte_bar

    path = hub.on_disk(arguments.model)
    with byte_bar("verifying") as progress:
        found = engines.engine_for(path).verify(path, progress, arguments.also)
    print(f"{arguments.model}: {found}")
