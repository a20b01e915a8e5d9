"""Write a checkpoint with a named model's real shapes and random weights."""

from __future__ import annotations

import argparse
from pathlib import Path

from flashmoe.cli import seed

HELP = "write a full-scale checkpoint of random weights"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="for example olmoe-1b-7b")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument(
        "--store", action="store_true", help="write a store at once, with no checkpoint beside it"
    )


def run(arguments: argparse.Namespace) -> None:
    from flashmoe.engines.transformers.checkpoints.synth import synthesise, synthesise_store
    from flashmoe.util.progress import byte_bar

    write = synthesise_store if arguments.store else synthesise
    with byte_bar("writing") as progress:
        write(
            arguments.name,
            arguments.directory,
            dtype=arguments.dtype,
            seed=arguments.seed,
            progress=progress,
        )
    print(f"{arguments.directory}: {arguments.name}, random weights, {arguments.dtype}")
