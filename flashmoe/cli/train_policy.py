"""Train an eviction policy on recorded routing."""

from __future__ import annotations

import argparse
from pathlib import Path

from flashmoe import trace
from flashmoe.cli import add_cluster, seed
from flashmoe.disk import files
from flashmoe.errors import FlashMoEError
from flashmoe.util import many_jobs

HELP = "train a policy on traces"
SEED = 20261124


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("traces", nargs="+", type=Path, metavar="TRACE")
    parser.add_argument("--out", required=True, type=Path, metavar="POLICY.safetensors")
    parser.add_argument(
        "--kind",
        default="learned",
        help="learned (default), paper, paper-vector or paper-experts; run it as learned:FILE or "
        "flashmoe-paper:FILE",
    )
    parser.add_argument("--seed", type=seed, default=SEED)
    add_cluster(parser)


def run(arguments: argparse.Namespace) -> None:
    from flashmoe import train

    if arguments.out.suffix != ".safetensors":
        raise FlashMoEError(f"--out {arguments.out} must end in .safetensors")
    files.check_replaceable(arguments.out)
    kind = train.kinds().get(arguments.kind)
    if kind is None:
        choices = ", ".join(train.kinds())
        raise FlashMoEError(f"--kind {arguments.kind!r} is unknown: choose from {choices}")
    traces = [trace.load(path) for path in arguments.traces]
    with many_jobs.on(arguments.cluster):
        kind().run(traces, arguments.out, arguments.seed, print)
    print(f"wrote {arguments.out}")
