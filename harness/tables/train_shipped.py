"""Train the policy that ships: `python -m harness.tables.train_shipped GPT-OSS-TRACE.npz`.

It learns from the shipped routing of small models and from gpt-oss-20b's recorded routing
(Apache-2.0), the held-out sequences of harness/tables/data_splits.py left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import flashmoe
from flashmoe import trace
from flashmoe.policies import flashmoe_paper
from flashmoe.policies.learned import SHIPPED
from flashmoe.train.learned import TrainLearned
from flashmoe.train.paper import TrainPaper, TrainPaperVector
from harness.tables import data_splits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("traces", nargs="*", type=Path, metavar="TRACE")
    parser.add_argument("--paper", action="store_true", help="the paper's networks, on the demo")
    parser.add_argument("--out", type=Path, default=SHIPPED)
    parser.add_argument("--seed", type=int, default=20261124)
    arguments = parser.parse_args()
    if arguments.paper:
        demo = data_splits.take(trace.load(flashmoe.demo_routing_path()), data_splits.TRAINED)
        TrainPaper().run([demo], flashmoe_paper.SHIPPED, arguments.seed, print)
        TrainPaperVector().run([demo], flashmoe_paper.SHIPPED_VECTOR, arguments.seed, print)
        return
    wholes = [whole for _, whole in data_splits.shipped()] + [
        trace.load(p) for p in arguments.traces
    ]
    parts = [data_splits.take(whole, data_splits.TRAINED) for whole in wholes]
    TrainLearned().run(parts, arguments.out, arguments.seed, print)


if __name__ == "__main__":
    main()
