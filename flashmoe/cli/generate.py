"""Generate text with the experts streamed from the SSD, printed token by token."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import flashmoe
from flashmoe.cli import add_memory
from flashmoe.disk import files

HELP = "generate text from a prompt"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", type=Path, help="Hugging Face directory or store (default: the demo)"
    )
    parser.add_argument("--prompt", required=True)
    add_memory(parser)
    parser.add_argument(
        "--raw",
        action="store_true",
        help="continue the prompt as it stands: no chat template",
    )
    parser.add_argument("--device", default="cpu", help="cpu, or an accelerator, such as cuda")
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


class _TokenCounter:
    """A streamer that counts tokens and passes them on to another streamer, if there is one."""

    def __init__(self, streamer: Any, telemetry: Any) -> None:
        self.streamer = streamer
        self.telemetry = telemetry
        self.prompt_passed = False

    def put(self, value: Any) -> None:
        self.telemetry.tokens += self.prompt_passed
        self.prompt_passed = True
        if self.streamer:
            self.streamer.put(value)

    def end(self) -> None:
        if self.streamer:
            self.streamer.end()


def _print_second(second: object) -> None:
    print(second, file=sys.stderr)


def run(arguments: argparse.Namespace) -> None:
    import torch

    from flashmoe.engines.telemetry import Telemetry
    from flashmoe.engines.transformers.prompting import Prompter
    from flashmoe.residency import warm_start

    if arguments.max_new_tokens < 1:
        raise flashmoe.FlashMoEError("--max-new-tokens must be at least 1")
    if arguments.warm:
        files.check_replaceable(arguments.warm)
    path = arguments.model or flashmoe.demo_path()
    prompter = Prompter(path, raw=arguments.raw)  # before the model, which takes minutes
    ids = prompter.token_ids(arguments.prompt)[None]
    model = flashmoe.load(
        path,
        memory=arguments.memory,
        policy=arguments.policy,
        device=arguments.device,
        prefetch=not arguments.no_prefetch,
    )
    try:
        ids = ids.to(model.device)
        if arguments.warm and arguments.warm.exists():
            warm_start.restore(model.flashmoe.residency, arguments.warm)
        telemetry = Telemetry(model.flashmoe, _print_second if arguments.stats else None)
        streamer = _TokenCounter(None if arguments.json else prompter.streamer(), telemetry)
        started = time.perf_counter()
        with torch.inference_mode(), telemetry:
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=arguments.max_new_tokens,
                do_sample=False,
                streamer=streamer,
            )
        seconds = time.perf_counter() - started
        new_tokens = output.shape[1] - ids.shape[1]
        stats = model.flashmoe.stats()
        if arguments.warm:
            warm_start.save(model.flashmoe.residency, arguments.warm)
    finally:
        model.flashmoe.close()
    if arguments.json:
        text = prompter.decode(output[0], skip_special_tokens=True)
        result = {"text": text, "token_ids": output[0].tolist()}
        result |= {"new_tokens": new_tokens, "seconds": seconds}
        result |= {"tokens_per_second": new_tokens / seconds, "stats": stats}
        result["each_second"] = [second._asdict() for second in telemetry.seconds]
        print(json.dumps(result))
    else:
        print(
            f"{new_tokens} tokens, {new_tokens / seconds:.1f} token/s, "
            f"hit rate {stats['hit_rate']:.1%}, {stats['bytes_read'] / 2**20:.0f} MiB read",
            file=sys.stderr,
        )
