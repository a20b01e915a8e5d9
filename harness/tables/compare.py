"""Every engine that runs a model beyond memory, ours or not, on the same weights in one table."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from flashmoe import trace
from flashmoe.engines.transformers.checkpoints.named_models import config_of
from flashmoe.errors import FlashMoEError
from harness.progress import say
from harness.report import report
from harness.runs import contenders, disturbance, gguf_file, peers, ssd
from harness.runs.contenders import STORE, Case, Contender, Run
from harness.runs.disturbance import Repeater, Watch
from harness.runs.gguf_systems import user_engine
from harness.runs.job import STEERED_TOKENS
from harness.runs.model_heads import checkpoint_facts
from harness.runs.page_cache import drop_all
from harness.runs.same_weights import WEIGHTS, SameWeights
from harness.tables import compare_rows, full_scale, speedups

PROMPTS = (STEERED_TOKENS, 2000)  # tokens; after the first of them it is decoded
ROUNDS = 2
REPEATED_SECONDS = 120  # a run that took longer is not repeated in later rounds
_ALL_FITS = 1.2  # of the files' size: one limit above is enough
_LARGE_VOCABULARY = 160_000  # of more words, the head's product takes more than BESIDE_BYTES
# For the estimate of minutes: what a run takes beside reading, how often it reads the files, and
# how fast weights are made up and written.
_RUN_SECONDS, _READS_OF_A_RUN, _READ_RATE, _WRITE_RATE = 25, 2, 1e9, 8e7


@dataclass(frozen=True)
class Plan:
    """What is compared. caps: shares of the model's size in bf16, whatever the weights."""

    model: str
    compared: Sequence[Contender]
    weights: Sequence[str] = ("bf16",)
    caps: Sequence[float] = full_scale.CAPS
    prompts: Sequence[int] = PROMPTS
    rounds: int = ROUNDS
    stores: Path | None = None  # where the files are kept; None: given back
    label: str = ""  # goes into the table's name

    def __post_init__(self) -> None:
        """Raises FlashMoEError for what is unknown, and for prompts that the model cannot take."""
        full_scale.shipped_routing(self.model)
        most = config_of(self.model).max_position_embeddings - contenders.DECODED_TOKENS
        if max(self.prompts) > most:
            raise FlashMoEError(f"{self.model} takes prompts of {most} tokens at most here")
        for name in self.weights:
            if name not in WEIGHTS:
                raise FlashMoEError(
                    f"no weights are called {name!r}: choose from {', '.join(WEIGHTS)}"
                )
        user_engine.check_distinct([contender.name for contender in self.compared])
        if not self.compared:
            raise FlashMoEError("nothing is left to compare: name other systems")


@dataclass(frozen=True)
class _Entry:
    """What is run once a round."""

    weights: SameWeights
    share: float
    prompt_tokens: int
    only_first: bool
    contender: Contender

    @property
    def name(self) -> str:
        contender = self.contender
        return (
            f"{self.weights.weights} {self.share} {self.prompt_tokens} {contender.name} "
            f"{contender.identity} {self.only_first}"
        )


def choose(names: Sequence[str], known: Sequence[Contender]) -> list[Contender]:
    """Those of these names, all where there is none; users' own in any case.

    Raises FlashMoEError for an unknown name.
    """
    by_name = {contender.name: contender for contender in known}
    for name in names:
        if name not in by_name:
            raise FlashMoEError(f"{name!r} cannot run here: choose from {', '.join(by_name)}")
    own = [contender for contender in known if contender.identity and contender.name not in names]
    return [by_name[name] for name in names] + own if names else list(known)


def compare(folder: Path, command: str, plan: Plan) -> None:
    """Write the weights, run all in turn, write the table; an interrupted one goes on."""
    title = full_scale.title_of("compare", plan.model, "", plan.label)
    routing = full_scale.shipped_routing(plan.model)
    recorded = trace.load(routing.trace).named(routing.sequence)
    prefix = recorded.first(STEERED_TOKENS + contenders.DECODED_TOKENS)
    runs: list[Run] = []
    repeater = Repeater(disturbance.AGAIN_SECONDS, say)
    scratch: AbstractContextManager[Path] = (
        nullcontext(plan.stores) if plan.stores else report.scratch(folder)
    )
    with scratch as home:
        home.mkdir(parents=True, exist_ok=True)
        each = [SameWeights(plan.model, name, home, prefix) for name in plan.weights]
        entries = [list(_entries(plan, weights)) for weights in each]
        _tell_needs(plan, entries, home)
        for weights, table in zip(each, entries, strict=True):
            journal = full_scale.journal(folder, title)
            runs += _measure(plan, weights, table, routing, repeater, journal)
            if not plan.stores:
                weights.give_back()
    rows = compare_rows.rows_of(runs, plan.compared, plan.prompts)
    full_scale.publish(folder, title, [{"model": plan.model} | row for row in rows], command)


def _entries(plan: Plan, weights: SameWeights) -> Iterator[_Entry]:
    """In the order of a round. Says whom and what it leaves out."""
    total = weights.model_bytes
    for contender in plan.compared:
        if reason := weights.refusal(contender.files):
            say(f"{contender.name} is left out of {weights.weights}: {reason}")
    for share in plan.caps:
        if not full_scale.fits(share * total):
            say(f"a limit of {share} of the model is left out: this machine has not the memory")
            continue
        above = [s for s in plan.caps if s < share and s * total > _ALL_FITS * weights.size_bytes]
        if above:
            say(f"{weights.weights}: all fits under {above[0]}, so {share} is left out")
            continue
        for prompt_tokens in plan.prompts:
            for contender in plan.compared:
                if not weights.refusal(contender.files):
                    only_first = prompt_tokens != plan.prompts[0]
                    yield _Entry(weights, share, prompt_tokens, only_first, contender)


def _tell_needs(plan: Plan, entries: list[list[_Entry]], home: Path) -> None:
    """Say what this will take. Raises FlashMoEError where the disk has not the room."""
    needs = [_needed_bytes(table) for table in entries]
    needed_bytes = sum(needs) if plan.stores else max(needs, default=0)
    free_bytes = shutil.disk_usage(home).free
    seconds = sum(needs) / _WRITE_RATE + plan.rounds * sum(
        _RUN_SECONDS + _READS_OF_A_RUN * entry.weights.size_bytes / _READ_RATE
        for table in entries
        for entry in table
    )
    runs = plan.rounds * sum(map(len, entries))
    say(
        f"{runs} runs, at most {needed_bytes / 1e9:.1f} GB of disk at once ({free_bytes / 1e9:.1f} "
        f"are free), about {seconds / 60:.0f} minutes"
    )
    if not runs:
        raise FlashMoEError(
            f"this machine has not the memory for {plan.model} at any of those caps"
        )
    if needed_bytes > free_bytes:
        raise FlashMoEError(
            f"{home} has {free_bytes / 1e9:.1f} GB free and the files take "
            f"{needed_bytes / 1e9:.1f}: name fewer systems, or another directory by --stores"
        )


def _needed_bytes(entries: Sequence[_Entry]) -> int:
    if not entries:
        return 0
    weights = entries[0].weights
    # which writes modules that it does not hold
    copies = any(entry.contender.name == "accelerate-disk" for entry in entries)
    return weights.missing_bytes(_kinds(entries)) + copies * weights.size_bytes


def _kinds(entries: Sequence[_Entry]) -> list[str]:
    """Which files these runs read. A hub's directory has the store beside it, for its sizes."""
    kinds = {entry.contender.files for entry in entries}
    return sorted(kinds | ({STORE} if peers.CHECKPOINT in kinds else set()))


def _measure(
    plan: Plan,
    weights: SameWeights,
    entries: list[_Entry],
    routing: full_scale.Routing,
    repeater: Repeater,
    journal: Path,
) -> list[Run]:
    rounds = range(plan.rounds)
    known = {
        name: run
        for number in rounds
        for entry in entries
        if (run := speedups.recall(journal, name := f"{number} {entry.name}")) is not None
    }
    files: dict[str, Path] = {}
    if len(known) < len(entries) * plan.rounds:
        files = {kind: weights.write(kind) for kind in _kinds(entries)}
    runs: list[Run] = []
    slow: set[str] = set()
    for number in rounds:
        for entry in entries:
            name = f"{number} {entry.name}"
            run = known.get(name)
            if run is None and entry.name in slow:
                continue
            if run is None:
                run = repeater.least_disturbed(partial(_run, plan, entry, files, routing))
                speedups.append(journal, name, number, run)
            if run["seconds"] > REPEATED_SECONDS:
                slow.add(entry.name)
            runs.append(run)
            say(f"round {number + 1} of {plan.rounds}: {_in_words(run)}")
    return runs


def _run(plan: Plan, entry: _Entry, files: dict[str, Path], routing: full_scale.Routing) -> Run:
    cap_bytes = int(entry.share * entry.weights.model_bytes)
    store = files.get(STORE, Path())
    case = Case(
        full_scale.job(routing, store, store), files, cap_bytes,
        _beside_bytes(plan.model, entry.prompt_tokens), entry.prompt_tokens, entry.only_first,
    )  # fmt: skip
    drive = _drive(files[entry.contender.files], entry.contender.files)
    drop_all()
    watch, started = Watch(), time.perf_counter()
    try:
        outcome = entry.contender.run(case)
    except FlashMoEError as error:
        outcome = {"outcome": str(error)}
    about = {
        "weights": entry.weights.weights, "cap_share": entry.share, "cap_bytes": cap_bytes,
        "prompt_tokens": entry.prompt_tokens, "system": entry.contender.name,
        "only_first": entry.only_first, "drive_bytes_per_second": drive,
        "seconds": time.perf_counter() - started,
    }  # fmt: skip
    return about | outcome | watch.since()


def _beside_bytes(model: str, prompt_tokens: int) -> int:
    """Of a limit, for Python, activations and what attention keeps of a longer prompt."""
    large = config_of(model).vocab_size > _LARGE_VOCABULARY
    longer = max(prompt_tokens - STEERED_TOKENS, 0)
    # twice: keys and values are copied as they grow
    kept = 2 * longer * checkpoint_facts(model).kv_bytes
    return full_scale.BESIDE_BYTES * (2 if large else 1) + kept


def _drive(path: Path, kind: str) -> float | None:
    """fio's speed for random reads of an expert's bytes from these files."""
    seconds = full_scale.FIO_SECONDS / 2
    if kind == STORE:
        drive = speedups.drive_of(path, seconds)
        return drive and drive()
    if ssd.fio_path() is None:
        return None
    if kind == peers.GGUF:
        _, expert_bytes = gguf_file.sizes(path)
    else:
        path, expert_bytes = max(path.glob("*.safetensors"), key=os.path.getsize), 1 << 20
    return ssd.read_speed(path, expert_bytes, seconds)


def _in_words(run: Run) -> str:
    what = f"{run['weights']}, {run['cap_share']}, {run['prompt_tokens']} tokens: {run['system']}"
    if run["outcome"] != "ok":
        return f"{what} {run['outcome']}"
    first = run["first_token_seconds"]
    told = [] if first is None else [f"first token after {first:.1f} s"]
    if not run["only_first"]:
        told.append(f"{run['tokens_per_second']:.2f} token/s")
    return f"{what} {', '.join(told)}"
