"""Train the policy that ships: `python -m harness.train_shipped GPT-OSS-TRACE.npz`.

It learns from the shipped routing of small models and from gpt-oss-20b's recorded routing
(Apache-2.0), the held-out sequences of harness/splits.py left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from flashmoe import trace
from flashmoe.policies.learned import SHIPPED
from flashmoe.train.learned import TrainLearned
from harness import splits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("traces", nargs="+", type=Path, metavar="TRACE")
    parser.add_argument("--out", type=Path, default=SHIPPED)
    parser.add_argument("--seed", type=int, default=20261124)
    arguments = parser.parse_args()
    wholes = [whole for _, whole in splits.shipped()] + [trace.load(p) for p in arguments.traces]
    parts = [splits.take(whole, splits.TRAINED) for whole in wholes]
    TrainLearned().run(parts, arguments.out, arguments.seed, print)


if __name__ == "__main__":
    main()
