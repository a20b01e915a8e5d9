"""Read every byte of a store and compare it with the checksums."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "check a store"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path)


def run(arguments: argparse.Namespace) -> None:
    from flashmoe.reading.verify import verify
    from flashmoe.util.progress import byte_bar

    with byte_bar("verifying") as progress:
        manifest = verify(arguments.store, progress)
    count = sum(layer.n_experts for layer in manifest.layers)
    print(f"{arguments.store}: all {count} experts are as they were packed")
