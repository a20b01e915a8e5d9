"""Write a checkpoint, a store or a GGUF file of a model's real shapes with random weights."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from flashmoe.cli import seed
from flashmoe.errors import FlashMoEError

HELP = "write a full-scale checkpoint of random weights"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="for example olmoe-1b-7b")
    parser.add_argument(
        "path", type=Path, help="a new directory, or a new file whose name ends with .gguf"
    )
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument(
        "--store", action="store_true", help="write a store at once, with no checkpoint beside it"
    )
    parser.add_argument(
        "--quant",
        metavar="TYPE",
        help="of a GGUF file such as q4_k_m, q8_0 or mxfp4; of a store int8, int4, or as it is "
        "published: mxfp4, fp8 (default: as --dtype)",
    )
    group = parser.add_argument_group("of a GGUF file")
    group.add_argument("--split", metavar="SIZE", help="in parts of this size, such as 2GiB")
    group.add_argument("--fuse", action="store_true", help="gate and up as one tensor")


def run(arguments: argparse.Namespace) -> None:
    from flashmoe.engines import llama

    is_gguf = llama.accepts(arguments.path)
    _check(arguments, is_gguf)
    quantised = arguments.quant or arguments.dtype
    if is_gguf:
        quantised = _write_gguf(arguments)
    else:
        _write_directory(arguments)
    print(f"{arguments.path}: {arguments.name}, random weights, {quantised}")


def _check(arguments: argparse.Namespace, is_gguf: bool) -> None:
    """Raises FlashMoEError for an option of another kind of file."""
    if is_gguf and arguments.store:
        raise FlashMoEError("--store makes a directory: leave it out for a GGUF file")
    if not is_gguf and (arguments.split or arguments.fuse):
        raise FlashMoEError("--split and --fuse are for GGUF files: end the path with .gguf")
    if arguments.quant and not (is_gguf or arguments.store):
        raise FlashMoEError(
            "--quant is for GGUF files and stores: end the path with .gguf, or add --store"
        )


def _write_directory(arguments: argparse.Namespace) -> None:
    """A checkpoint or a store."""
    from flashmoe.engines.transformers.checkpoints.synth import synthesise, synthesise_store
    from flashmoe.quant import NONE
    from flashmoe.util.progress import byte_bar

    write: Callable[..., None] = synthesise
    if arguments.store:
        write = partial(synthesise_store, quant=arguments.quant or NONE)
    with byte_bar("writing") as progress:
        write(
            arguments.name,
            arguments.path,
            dtype=arguments.dtype,
            seed=arguments.seed,
            progress=progress,
        )


def _write_gguf(arguments: argparse.Namespace) -> str:
    """Returns the quantisation."""
    try:
        from flashmoe.engines.llama.files import writer
    except ImportError as error:
        raise FlashMoEError(
            f"{error.name} is not installed: pip install 'flashmoe-ssd[llama]'"
        ) from None
    from flashmoe.engines.transformers.checkpoints.named_models import config_of
    from flashmoe.engines.transformers.checkpoints.random_weights import RandomWeights
    from flashmoe.util.progress import byte_bar
    from flashmoe.util.sizes import parse_bytes

    floats = {"bf16": "bf16", "fp16": "f16", "fp32": "f32"}
    quantised: str = arguments.quant or floats[arguments.dtype]
    source = RandomWeights(config_of(arguments.name, arguments.dtype), arguments.seed)
    with byte_bar("writing") as progress:
        writer.write(
            source,
            arguments.path,
            quantised,
            split_bytes=parse_bytes(arguments.split) if arguments.split else 0,
            fuse=arguments.fuse,
            progress=progress,
        )
    return quantised
