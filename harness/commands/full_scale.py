"""Measure the speedup table at a real model's size: random weights, recorded routing."""

from __future__ import annotations

import argparse
from pathlib import Path

from flashmoe.errors import FlashMoEError
from harness.commands import amount, count

HELP = "the speedup table at a real model's size"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="olmoe-1b-7b")
    parser.add_argument("--stores", type=Path, help="keep checkpoint and store in this directory")
    parser.add_argument("--caps", type=amount, nargs="+", help="shares of the model's size")
    parser.add_argument(
        "--slots", type=count, nargs="+", help="in their place: experts of each layer"
    )
    parser.add_argument("--systems", nargs="+", help="see baselines/")
    parser.add_argument("--rounds", type=count, default=2)
    parser.add_argument("--read-limit", help="bytes a second, such as 550MB: a slower drive")
    parser.add_argument(
        "--storage",
        nargs="+",
        metavar="CLASS",
        help="in its place: a table of slower drives by class: emmc sata ufs pcie3 pcie4 pcie5",
    )
    parser.add_argument("--routing", type=Path, help="a trace in place of the shipped one")
    parser.add_argument("--sequence", help="with --routing: which of its sequences is replayed")
    parser.add_argument(
        "--decode-seconds", type=amount, help="of each run at most, and half as many to warm up"
    )
    parser.add_argument("--quant", default="none", help="int8 or int4")
    parser.add_argument("--label", default="", help="goes into the table's name")


def run(arguments: argparse.Namespace) -> Path:
    from flashmoe.util.sizes import parse_bytes
    from harness.reproduce import folder_for
    from harness.tables.full_scale import Comparison, Routing, full_scale
    from harness.tables.storage_table import storage

    if arguments.storage and (arguments.read_limit or arguments.slots):
        raise FlashMoEError("--storage names the limits itself: leave out --read-limit and --slots")
    if (arguments.routing is None) != (arguments.sequence is None):
        raise FlashMoEError("--routing and --sequence go together: give both or neither")
    names = ("caps", "slots", "systems", "decode_seconds", "stores", "label")
    options = {name: value for name in names if (value := getattr(arguments, name))}
    if arguments.read_limit:
        options["read_bytes_per_second"] = parse_bytes(arguments.read_limit)
    if arguments.routing:
        options["routing"] = Routing(arguments.routing, arguments.sequence)
    comparison = Comparison(
        arguments.model, rounds=arguments.rounds, scheme=arguments.quant, **options
    )
    folder = folder_for("full-scale")
    if arguments.storage:
        storage(folder, arguments.command_line, comparison, arguments.storage)
    else:
        full_scale(folder, arguments.command_line, comparison)
    return folder
