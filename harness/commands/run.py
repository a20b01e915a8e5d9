"""Run one system once, in this process, and print what it did as JSON."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

HELP = "one system, once, in this process; prints JSON"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("system")
    parser.add_argument("--job", help="a harness.runs.job.Job as JSON (default: the demo model)")
    parser.add_argument("--memory", default="12MiB")
    parser.add_argument("--prompt", default="And it came to pass")
    parser.add_argument("--max-new-tokens", type=int, default=48)


def run(arguments: argparse.Namespace) -> None:
    import flashmoe
    from flashmoe.engines.transformers.checkpoints.pack import pack
    from flashmoe.util.sizes import parse_bytes
    from harness.runs.job import Job
    from harness.runs.run import run

    if arguments.job:
        print(json.dumps(run(Job.from_json(arguments.job))))
        return
    demo, memory_bytes = flashmoe.demo_path(), parse_bytes(arguments.memory)
    with TemporaryDirectory(prefix="flashmoe-") as folder:
        store = Path(folder) / "store"
        pack(demo, store)
        job = Job(
            arguments.system, demo, store, memory_bytes, arguments.prompt, arguments.max_new_tokens
        )
        print(json.dumps(run(job)))
