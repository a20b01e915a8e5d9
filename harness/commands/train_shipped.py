"""Train the policy that ships.

It learns from the shipped routing of small models and from the traces given (for the shipped one
gpt-oss-20b's), the held-out sequences of harness/tables/data_splits.py left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from flashmoe.cli import add_cluster
from flashmoe.util import many_jobs

HELP = "train the policy that ships"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("traces", nargs="*", type=Path, metavar="TRACE")
    parser.add_argument("--paper", action="store_true", help="the paper's networks, on the demo")
    parser.add_argument("--out", type=Path, help="default: in place of the shipped file")
    parser.add_argument("--seed", type=int, default=20261124)
    add_cluster(parser)


def run(arguments: argparse.Namespace) -> None:
    from flashmoe import trace
    from flashmoe.policies.learned import SHIPPED
    from harness.tables import train_shipped

    outside = [trace.load(path) for path in arguments.traces]
    with many_jobs.on(arguments.cluster):
        if arguments.paper:
            train_shipped.train_paper(arguments.seed)
        else:
            train_shipped.train_learned(outside, arguments.out or SHIPPED, arguments.seed)
