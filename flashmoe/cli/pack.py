"""Pack a Hugging Face checkpoint into a store: one aligned extent for each expert."""

from __future__ import annotations

import argparse
from pathlib import Path

from flashmoe.engines import hub
from flashmoe.util.sizes import format_bytes

HELP = "turn a checkpoint into a store"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("store", type=Path)
    parser.add_argument(
        "--quant",
        default="none",
        metavar="SCHEME",
        help="fewer bytes an expert: int8 or int4 (default: none)",
    )


def run(arguments: argparse.Namespace) -> None:
    from flashmoe.engines.transformers.checkpoints.pack import pack
    from flashmoe.util.progress import byte_bar

    checkpoint = hub.on_disk(arguments.checkpoint)
    with byte_bar("packing") as progress:
        manifest = pack(checkpoint, arguments.store, quant=arguments.quant, progress=progress)
    layer = manifest.layers[0]
    print(
        f"{arguments.store}: {len(manifest.layers)} MoE layers x {layer.n_experts} experts of "
        f"{format_bytes(layer.extent_bytes)}, {format_bytes(manifest.experts_bytes)} in all"
    )
