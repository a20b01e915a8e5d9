"""Pack a Hugging Face checkpoint into a store: one aligned extent for each expert."""

from __future__ import annotations

import argparse
from pathlib import Path

from flashmoe.engines import hub
from flashmoe.errors import FlashMoEError
from flashmoe.util.sizes import format_bytes

HELP = "turn a checkpoint into a store"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("store", type=Path)
    parser.add_argument(
        "--give-back",
        action="store_true",
        help="of a name on the hub: its cache loses the weights while they are packed, so that "
        "the disk holds them once",
    )
    parser.add_argument(
        "--quant",
        default="none",
        metavar="SCHEME",
        help="fewer bytes an expert: int8 or int4 (default: none)",
    )
    parser.add_argument(
        "--also",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="a folder on another drive that gets a copy of the store, for reads from both; may "
        "be given again",
    )
    parser.add_argument(
        "--stripe",
        action="store_true",
        help="with --also: each folder gets a share of the experts in place of a copy",
    )


def run(arguments: argparse.Namespace) -> None:
    from flashmoe.engines.transformers.checkpoints.pack import pack
    from flashmoe.util.progress import byte_bar

    if arguments.give_back and not hub.is_name(arguments.checkpoint):
        raise FlashMoEError(
            f"{arguments.checkpoint} is no name on the hub, and stays as it is: leave out "
            "--give-back"
        )
    if arguments.stripe and not arguments.also:
        raise FlashMoEError("--stripe shares experts among drives: name another folder by --also")
    checkpoint = hub.on_disk(arguments.checkpoint)
    with byte_bar("packing") as progress:
        manifest = pack(
            checkpoint,
            arguments.store,
            quant=arguments.quant,
            progress=progress,
            give_back=arguments.give_back,
            also=arguments.also,
            stripe=arguments.stripe,
        )
    layer = manifest.layers[0]
    print(
        f"{arguments.store}: {len(manifest.layers)} MoE layers x {layer.n_experts} experts of "
        f"{format_bytes(layer.extent_bytes)}, {format_bytes(manifest.experts_bytes)} in all"
    )
