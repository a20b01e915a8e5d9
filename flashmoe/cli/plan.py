"""Say how fast a model would run here, and how to run it, before it is fetched or loaded."""

from __future__ import annotations

import argparse
import json

from flashmoe.errors import FlashMoEError

HELP = "how fast a model would run here, and how to run it"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="GGUF file, Hugging Face directory, store, or a hub name")
    parser.add_argument("--context", type=int, default=4096, metavar="TOKENS")
    parser.add_argument(
        "--memory",
        default="auto",
        help="the budget for experts that is meant, such as 4GiB (default: the best is looked for)",
    )
    parser.add_argument(
        "--prompt-tokens", type=int, default=500, metavar="TOKENS", help="of the first answer"
    )
    parser.add_argument(
        "--arithmetic", choices=("exact", "fast"), default="exact", help="as for `generate`"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> None:
    from flashmoe.plan import report
    from flashmoe.plan.planner import AUTO, Request
    from flashmoe.util.sizes import parse_bytes

    if min(arguments.context, arguments.prompt_tokens) < 1:
        raise FlashMoEError("--context and --prompt-tokens must be at least 1")
    request = Request(
        arguments.context,
        arguments.prompt_tokens,
        arguments.arithmetic,
        None if arguments.memory == AUTO else parse_bytes(arguments.memory),
    )
    plan = report.make(arguments.model, request)
    print(json.dumps(plan.as_dict()) if arguments.json else report.text(plan))
