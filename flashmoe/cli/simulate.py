"""Replay a recorded trace against policies and capacities. No model is run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from flashmoe import policies, trace
from flashmoe.cache import simulate
from flashmoe.cache.replays import ReplayJob, replay_all
from flashmoe.cli import add_cluster
from flashmoe.errors import FlashMoEError
from flashmoe.util import many_jobs
from flashmoe.util.progress import count_bar

HELP = "replay a trace against policies and capacities"
DEFAULT_CAPACITIES = [0.125, 0.25, 0.375, 0.5, 0.75]


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", type=Path)
    parser.add_argument(
        "--policy", nargs="+", action="extend", metavar="NAME", help="default: all of them"
    )
    parser.add_argument(
        "--capacity",
        nargs="+",
        action="extend",
        type=float,
        metavar="F",
        help=f"fractions of a layer's experts (default: {' '.join(map(str, DEFAULT_CAPACITIES))})",
    )
    parser.add_argument(
        "--slots",
        nargs="+",
        action="extend",
        type=float,
        metavar="N",
        help="slots per layer, as an engine counted them, instead of fractions; of 20.5 the lower "
        "half of the layers has 21, the others 20",
    )
    parser.add_argument(
        "--warm", action="store_true", help="carry residency from sequence to sequence"
    )
    parser.add_argument(
        "--global", dest="shared", action="store_true", help="one budget for all layers"
    )
    parser.add_argument(
        "--as-recorded",
        action="store_true",
        help="one event per recorded forward pass and layer, not per token",
    )
    parser.add_argument(
        "--no-bypass",
        dest="bypass",
        action="store_false",
        help="keep every expert that is read; else a policy such as learned may compute a token's "
        "experts without keeping them, for which it has top_k slots (of the whole model) more than "
        "others",
    )
    parser.add_argument(
        "--sequential",
        action="store_true",
        help="a token's experts one after another, which may evict each other; not event-atomic",
    )
    parser.add_argument(
        "--decode-only",
        action="store_true",
        help="do not count prompts, of which only the last token's experts stay resident",
    )
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        metavar="N",
        help="with --decode-only: each sequence's first N, where the trace records no prompts",
    )
    add_cluster(parser)
    parser.add_argument("--json", action="store_true")


def run(arguments: argparse.Namespace) -> None:
    recorded = trace.load(arguments.trace)
    names = arguments.policy or list(policies.available())
    capacities = arguments.capacity or ([] if arguments.slots else DEFAULT_CAPACITIES)
    for name in names:
        policies.get(name)
    for capacity in capacities:
        simulate.slots_for(recorded, capacity)
    for slots in arguments.slots or []:
        if not 1 <= slots <= recorded.n_experts:
            raise FlashMoEError(f"--slots {slots:g}: a layer has 1 to {recorded.n_experts}")
    sizes: list[tuple[float, float | None]] = [(capacity, None) for capacity in capacities]
    sizes += [(slots / recorded.n_experts, slots) for slots in arguments.slots or []]
    conditions = simulate.Conditions(
        arguments.warm,
        arguments.shared,
        arguments.as_recorded,
        bypass=arguments.bypass,
        sequential=arguments.sequential,
        decode_only=arguments.decode_only,
        prompt_tokens=arguments.prompt_tokens,
    )
    jobs = [
        ReplayJob(recorded, name, capacity, conditions, slots)
        for capacity, slots in sizes
        for name in names
    ]
    events = sum(job.events for job in jobs)
    with many_jobs.on(arguments.cluster), count_bar("replaying", events, "event") as progress:
        rows = [outcome.row() for outcome in replay_all(jobs, progress)]
    if arguments.json:
        print(json.dumps(rows))
        return
    print(
        f"{'policy':16} {'capacity':>8} {'slots':>6} {'requests':>10} {'hits':>10} {'hit rate':>8}"
    )
    for row in rows:
        print(
            f"{row['policy']:16} {row['capacity']:8.3f} {row['slots']:6.4g} {row['requests']:10} "
            f"{row['hits']:10} {row['hit_rate']:8.4f}"
        )
