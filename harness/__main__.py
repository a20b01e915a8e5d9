"""The referee: measure the drive, replay routing, run systems, check committed results."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from flashmoe.errors import FlashMoEError


def _above_zero(kind: Callable[[str], float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} is not above zero")
        return value

    parse.__name__ = kind.__name__  # which argparse names where `kind` itself refuses
    return parse


_COUNT, _AMOUNT = _above_zero(int), _above_zero(float)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m harness", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("ssd", help="measure the drive by fio and by the engine's reader")
    rates = commands.add_parser("hit-rates", help="replay recorded routing")
    rates.add_argument(
        "--traces", type=Path, help="also the shipped small models', and every trace of this folder"
    )
    commands.add_parser("generation", help="where a token's time goes, on the demo model")
    commands.add_parser("speedups", help="every system under memory caps, in minutes")
    full = commands.add_parser("full-scale", help="the speedup table at a real model's size")
    full.add_argument("model", nargs="?", default="olmoe-1b-7b")
    full.add_argument("--stores", type=Path, help="keep checkpoint and store in this directory")
    full.add_argument("--caps", type=_AMOUNT, nargs="+", help="shares of the model's size")
    full.add_argument(
        "--slots", type=_COUNT, nargs="+", help="in their place: experts of each layer"
    )
    full.add_argument("--systems", nargs="+", help="see baselines/")
    full.add_argument("--rounds", type=_COUNT, default=2)
    full.add_argument("--read-limit", help="bytes a second, such as 550MB: a slower drive")
    full.add_argument("--routing", type=Path, help="a trace in place of the shipped one")
    full.add_argument("--sequence", help="with --routing: which of its sequences is replayed")
    full.add_argument(
        "--decode-seconds", type=_AMOUNT, help="of each run at most, and half as many to warm up"
    )
    full.add_argument("--quant", default="none", help="int8 or int4")
    full.add_argument("--label", default="", help="goes into the table's name")
    against = commands.add_parser("peers", help="the table against llama.cpp")
    against.add_argument("model", nargs="?", default="olmoe-1b-7b")
    against.add_argument("--stores", type=Path, help="keep store and GGUF file in this directory")
    against.add_argument("--caps", type=_AMOUNT, nargs="+", help="shares of the model's size")
    against.add_argument("--rounds", type=_COUNT, default=2)
    against.add_argument("--quant", default="none", help="int8 or int4: llama.cpp's Q8_0, Q4_0")
    fewer = commands.add_parser("quant", help="what quantised experts bring and cost")
    fewer.add_argument("model", nargs="?", default="olmoe-1b-7b")
    fewer.add_argument("--stores", type=Path, help="keep the stores in this directory")
    fewer.add_argument("--rounds", type=_COUNT, default=2)
    fewer.add_argument("--texts", type=Path, help="measure quality instead, on texts fetched here")
    commands.add_parser("families", help="which MoE families are streamed as they should be")
    commands.add_parser("long-prompts", help="what a prompt of 32k tokens takes beside the budget")
    failing = commands.add_parser("faults", help="failing drives and killed packs, counted")
    failing.add_argument("--count", type=_COUNT, default=1000, help="faults of each kind")
    failing.add_argument("--kills", type=_COUNT, default=500)
    mutated = commands.add_parser("mutations", help="damaged checkpoints against transformers")
    mutated.add_argument("--count", type=_COUNT, default=1000)
    mutated.add_argument("--seed", type=int, default=0)
    long = commands.add_parser("soak", help="does anything grow in hours of use?")
    long.add_argument("--seconds", type=_AMOUNT, default=3600)
    run = commands.add_parser("run", help="one system, once, in this process; prints JSON")
    run.add_argument("system")
    run.add_argument("--job", help="a harness.runs.job.Job as JSON (default: the demo model)")
    run.add_argument("--memory", default="12MiB")
    run.add_argument("--prompt", default="And it came to pass")
    run.add_argument("--max-new-tokens", type=int, default=48)
    reproduce = commands.add_parser("reproduce", help="everything, into results/")
    reproduce.add_argument("--profile", choices=("quick", "desktop"), default="quick")
    commands.add_parser("check", help="do the committed results come out of this code?")
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    if arguments.command == "run":  # nothing else imported: it may have little memory
        _run_one(arguments)
        return
    from flashmoe.util.sizes import parse_bytes
    from harness import reproduce as steps
    from harness.report import provenance, report

    folder = steps.folder_for("quick")
    command = f"python -m harness {arguments.command}"
    match arguments.command:
        case "check":
            from harness.check import check

            check()
            return
        case "families":
            from harness import tiny_models
            from harness.tables import families

            families.write([families.examine(family) for family in tiny_models.families()])
            return
        case "ssd":
            steps.run_ssd(folder, command)
        case "hit-rates":
            if arguments.traces:
                folder = steps.folder_for("policies")
                command += " --traces DIR"
            steps.run_hit_rates(folder, command, arguments.traces)
        case "generation":
            steps.run_generation(folder, command)
        case "speedups":
            steps.run_speedups(folder, command)
        case "full-scale":
            from harness.tables.full_scale import Model, full_scale

            if (arguments.routing is None) != (arguments.sequence is None):
                raise FlashMoEError("--routing and --sequence go together: give both or neither")
            routing = arguments.routing and Model(arguments.routing, arguments.sequence)
            given = {k: v for k in ("caps", "slots", "systems") if (v := getattr(arguments, k))}
            seconds = arguments.decode_seconds
            limit = arguments.read_limit and parse_bytes(arguments.read_limit)
            command += (
                f" {arguments.model} --rounds {arguments.rounds}"
                + "".join(f" --{key} {' '.join(map(str, value))}" for key, value in given.items())
                + (f" --quant {arguments.quant}" if arguments.quant != "none" else "")
                + (f" --read-limit {arguments.read_limit}" if limit else "")
                + (f" --routing TRACE --sequence {arguments.sequence}" if routing else "")
                + (f" --decode-seconds {seconds:g}" if seconds else "")
                + (f" --label {arguments.label}" if arguments.label else "")
            )
            full_scale(
                steps.folder_for("full-scale"),
                command,
                arguments.model,
                rounds=arguments.rounds,
                read_bytes_per_second=limit,
                stores=arguments.stores,
                model=routing,
                label=arguments.label,
                scheme=arguments.quant,
                **given,
                **({"decode_seconds": seconds} if seconds else {}),
            )
        case "peers":
            from harness.tables.full_scale import CAPS
            from harness.tables.peer_table import peer_table

            caps = arguments.caps or CAPS
            command += (
                f" {arguments.model} --quant {arguments.quant} --caps {' '.join(map(str, caps))}"
                f" --rounds {arguments.rounds}"
            )
            peer_table(
                steps.folder_for("full-scale"),
                command,
                arguments.model,
                caps=caps,
                rounds=arguments.rounds,
                stores=arguments.stores,
                scheme=arguments.quant,
            )
        case "soak":
            from harness.progress import say
            from harness.torture.soak import soak

            report.write(folder, "soak", soak(arguments.seconds, say))
            report.provenance(folder, "soak", provenance.gather(command, folder, seed=0))
        case "long-prompts":
            from harness.tables import long_prompts

            report.write(folder, "long_prompts", long_prompts.table())
            report.provenance(folder, "long_prompts", provenance.gather(command, folder, seed=0))
        case "faults":
            from harness.torture import faults

            report.write(folder, "faults-reads", faults.reads(arguments.count))
            report.write(folder, "faults-kills", faults.kills(arguments.kills))
            report.provenance(folder, "faults", provenance.gather(command, folder, seed=0))
        case "mutations":
            from harness.progress import say
            from harness.torture import mutants

            rows = mutants.examine(arguments.count, arguments.seed, say)
            report.write(folder, "mutations", rows)
            found = provenance.gather(command, folder, seed=arguments.seed)
            report.provenance(folder, "mutations", found)
        case "quant":
            from harness.tables import quant_table

            folder = steps.folder_for("full-scale")
            if arguments.texts:
                quant_table.quality(folder, command + " --texts DIR", arguments.texts)
            else:
                quant_table.speed(
                    folder,
                    f"{command} {arguments.model} --rounds {arguments.rounds}",
                    arguments.model,
                    rounds=arguments.rounds,
                    stores=arguments.stores,
                )
        case "reproduce":
            steps.reproduce(arguments.profile)
    report.readme()


def _run_one(arguments: argparse.Namespace) -> None:
    from tempfile import TemporaryDirectory

    import flashmoe
    from flashmoe.store.pack import pack
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
        new = arguments.max_new_tokens
        print(
            json.dumps(run(Job(arguments.system, demo, store, memory_bytes, arguments.prompt, new)))
        )


def _stop(*_: object) -> None:
    raise KeyboardInterrupt  # so that cgroups, processes and scratch files go as on Ctrl-C


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    try:
        main()
    except FlashMoEError as error:
        sys.exit(f"harness: {error}")
    except KeyboardInterrupt:
        sys.exit("harness: interrupted")
