"""Record the routing of a model on prompts: one line of the file is one prompt.

A file ending in .json is a list of strings, or an object from names to strings.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import flashmoe
from flashmoe import engines
from flashmoe.cli import add_memory
from flashmoe.disk import files
from flashmoe.engines import hub

HELP = "write a trace of a model's routing"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="GGUF file, directory or store")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="TRACE.npz")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="0: only the prompts")
    add_memory(parser)
    parser.add_argument(
        "--raw",
        action="store_true",
        help="prompts as they stand: no chat template",
    )
    parser.add_argument("--policy", default="learned", help="see `flashmoe policies`")
    parser.add_argument(
        "--probabilities",
        action="store_true",
        help="keep the router's probabilities of all experts",
    )
    parser.add_argument(
        "--guesses", action="store_true", help="keep what prefetching would guess a layer ahead"
    )


def read_prompts(path: Path) -> dict[str, str]:
    """Prompts by name. Raises FlashMoEError when the file is no list of prompts."""
    try:
        text = path.read_text("utf-8")
        if path.suffix == ".json":
            document = json.loads(text)
            if not isinstance(document, dict | list):
                raise ValueError("it is neither a list nor an object")
            prompts = document if isinstance(document, dict) else dict(enumerate(document))
        else:
            prompts = dict(enumerate(line for line in text.splitlines() if line.strip()))
    except (OSError, ValueError, RecursionError) as error:
        raise flashmoe.FlashMoEError(f"prompts {path} cannot be read ({error})") from None
    if not prompts or not all(isinstance(p, str) and p for p in prompts.values()):
        raise flashmoe.FlashMoEError(f"prompts {path}: give at least one, each a non-empty string")
    return {str(name): prompt for name, prompt in prompts.items()}


def run(arguments: argparse.Namespace) -> None:
    if arguments.out.suffix != ".npz":
        raise flashmoe.FlashMoEError(f"--out {arguments.out} must end in .npz")
    if arguments.max_new_tokens < 0:
        raise flashmoe.FlashMoEError("--max-new-tokens must be 0 or more")
    files.check_replaceable(arguments.out)
    prompts = read_prompts(arguments.prompts)
    path = hub.on_disk(arguments.model)
    session = engines.engine_for(path).open_session(
        path,
        list(prompts.values()),
        max_new_tokens=arguments.max_new_tokens,
        raw=arguments.raw,
        memory=arguments.memory,
        policy=arguments.policy,
    )
    try:
        trace = session.record(
            probabilities=arguments.probabilities,
            guesses=arguments.guesses,
            info={
                "model": arguments.model.name,
                "phase": "prefill and decode" if arguments.max_new_tokens else "prefill",
                "source": "flashmoe record",
                "names": list(prompts),
            },
        )
        counted = session.engine.snapshot().for_replay()
    finally:
        session.close()
    trace.info |= counted
    trace.save(arguments.out)
    print(
        f"{arguments.out}: {len(trace.experts)} tokens x {trace.n_layers} layers x top-"
        f"{trace.top_k} of {trace.n_experts}; the engine counted {counted['hits']} hits of "
        f"{counted['requests']}"
    )
