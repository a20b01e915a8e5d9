"""Generate text with the experts streamed from the SSD, printed token by token."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import flashmoe
from flashmoe import engines
from flashmoe.cli import add_also, add_memory
from flashmoe.disk import files
from flashmoe.engines import hub

HELP = "generate text from a prompt"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        type=Path,
        help="GGUF file, Hugging Face directory, store, or a name on the hub (default: the demo)",
    )
    parser.add_argument("--prompt", required=True)
    add_memory(parser)
    add_also(parser)
    parser.add_argument(
        "--raw",
        action="store_true",
        help="continue the prompt as it stands: no chat template",
    )
    parser.add_argument("--device", default="cpu", help="cpu, or an accelerator, such as cuda")
    parser.add_argument(
        "--arithmetic",
        choices=("exact", "fast"),
        default="exact",
        help="fast: quantised weights are multiplied as they lie, in float32",
    )
    parser.add_argument("--policy", default="learned", help="see `flashmoe policies`")
    parser.add_argument(
        "--no-prefetch", action="store_true", help="read an expert only when a router has chosen it"
    )
    parser.add_argument(
        "--warm",
        type=Path,
        metavar="FILE",
        help="start from the cache that the last run saved here, and save this run's",
    )
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--stats", action="store_true", help="print statistics every second")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")


def _print_second(second: object) -> None:
    print(second, file=sys.stderr)


def run(arguments: argparse.Namespace) -> None:
    from flashmoe.engines.telemetry import Telemetry
    from flashmoe.residency import warm_start

    if arguments.max_new_tokens < 1:
        raise flashmoe.FlashMoEError("--max-new-tokens must be at least 1")
    if arguments.warm:
        files.check_replaceable(arguments.warm)
    path = hub.on_disk(arguments.model) if arguments.model else flashmoe.demo_path()
    session = engines.engine_for(path).open_session(
        path,
        [arguments.prompt],
        max_new_tokens=arguments.max_new_tokens,
        raw=arguments.raw,
        memory=arguments.memory,
        policy=arguments.policy,
        device=arguments.device,
        prefetch=not arguments.no_prefetch,
        arithmetic=arguments.arithmetic,
        also=arguments.also,
    )
    try:
        if arguments.warm and arguments.warm.exists():
            session.restore(arguments.warm)
        telemetry = Telemetry(session.engine, _print_second if arguments.stats else None)

        def count() -> None:
            telemetry.tokens += 1

        started = time.perf_counter()
        with telemetry:
            done = session.generate(show=not arguments.json, count=count)
        seconds = time.perf_counter() - started
        stats = session.engine.stats()
        if arguments.warm:
            warm_start.save(session.engine.residency, arguments.warm)
    finally:
        session.close()
    if arguments.json:
        result = {**done._asdict(), "seconds": seconds}
        result |= {"tokens_per_second": done.new_tokens / seconds, "stats": stats}
        result["each_second"] = [second._asdict() for second in telemetry.seconds]
        print(json.dumps(result))
    else:
        print(
            f"{done.new_tokens} tokens, {done.new_tokens / seconds:.1f} token/s, "
            f"hit rate {stats['hit_rate']:.1%}, {stats['bytes_read'] / 2**20:.0f} MiB read",
            file=sys.stderr,
        )
