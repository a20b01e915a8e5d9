"""The speedup table at a real model's size: synthetic weights, recorded routing, real caps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil

import baselines
import flashmoe
from flashmoe import quant
from flashmoe.engines.transformers.checkpoints.named_models import total_bytes
from flashmoe.engines.transformers.checkpoints.synth import synthesise_store
from flashmoe.errors import FlashMoEError
from flashmoe.residency.budget import SPARES
from flashmoe.store import manifest as manifests
from flashmoe.store.manifest import Manifest
from harness.progress import say
from harness.report import report
from harness.runs import disturbance
from harness.runs.disturbance import Repeater
from harness.runs.isolated_run import run_alone
from harness.runs.job import STEERED_TOKENS, Job
from harness.tables import random_stores, speedups

ROUTING = Path(flashmoe.__file__).parent / "routing"


class Routing(NamedTuple):
    """A recorded sequence whose experts a model takes."""

    trace: Path
    sequence: str


MODELS = {
    "olmoe-quarter": Routing(flashmoe.demo_routing_path(), "python-1"),
    "olmoe-1b-7b": Routing(flashmoe.demo_routing_path(), "python-1"),
    "deepseek-v2-lite": Routing(ROUTING / "deepseek-v2-lite.npz", "kernel-docs-0"),
    "qwen3-30b-a3b": Routing(ROUTING / "qwen3-30b-a3b.npz", "kernel-docs-0"),
    "gpt-oss-20b": Routing(ROUTING / "gpt-oss-20b.npz", "kernel-docs-0"),
}
SHIPPED = "shipped"  # what a row says of routing that comes with the project
CAPS = (0.15, 0.25, 0.4, 0.6, 1.2)  # as far as the machine has the memory
SYSTEMS = (
    "flashmoe",
    "flashmoe-no-prefetch",
    "flashmoe-lru",
    "fiddler",
    "daop",
    "os-paging",
    "os-paging-willneed",
)
# A prompt that touches nearly every expert: a first read is checked, and decode shall not pay it.
PROMPT_TOKENS = STEERED_TOKENS
WARM_UP_TOKENS, TOKENS, ROUNDS = 8, 32, 2
DECODE_SECONDS = 12.0  # slow systems stop then, whatever tokens are missing
UNEVEN_RATIO = 1.2  # of the median token's speed to that of all, above which a run is called uneven
# Of a cap: Python, torch, transformers, a prompt's activations and what the allocator keeps.
BESIDE_BYTES = 768 << 20
FIO_SECONDS = 1.0


def shipped_routing(name: str) -> Routing:
    """Raises FlashMoEError for a model of which no routing is shipped."""
    if name not in MODELS:
        raise FlashMoEError(f"no routing is shipped for {name!r}: choose from {', '.join(MODELS)}")
    return MODELS[name]


@dataclass(frozen=True)
class Comparison:
    """What a full-scale table compares, and under which limits."""

    model: str  # of MODELS
    caps: Sequence[float] = CAPS  # shares of the model's size
    slots: Sequence[int] = ()  # in their place: experts of each layer that FlashMoE has room for
    systems: Sequence[str] = SYSTEMS
    rounds: int = ROUNDS
    decode_seconds: float = DECODE_SECONDS
    read_bytes_per_second: int | None = None  # the kernel's limit on reading
    stores: Path | None = None  # where checkpoint and store are kept; None: given back
    routing: Routing | None = None  # in place of the shipped
    label: str = ""  # goes into the table's name
    scheme: str = quant.NONE  # of the experts' weights
    timelines: bool = True  # also one token with, and one without guesses
    until: float | None = None  # on time.monotonic(): no run begins after it

    def __post_init__(self) -> None:
        """Raises FlashMoEError for an unknown model or system, before gigabytes are written."""
        shipped_routing(self.model)
        for system in self.systems:
            baselines.get(system)

    def home(self, work: Path) -> Path:
        """Where checkpoint and store lie; `work`: where they are given back."""
        return self.stores / f"{self.model}-{self.scheme}" if self.stores else work


QUICK = Comparison(
    "olmoe-quarter",
    caps=(0.4,),  # with less, Python alone nearly fills it
    systems=("flashmoe", "fiddler", "daop", "os-paging"),
    rounds=1,
    decode_seconds=3.0,
    timelines=False,
)


def full_scale(folder: Path, command: str, comparison: Comparison) -> None:
    """Write checkpoint and store, run every system under every cap, write the tables."""
    name = comparison.model
    routing = comparison.routing or shipped_routing(name)
    with report.scratch(comparison.stores or folder) as work:
        home = comparison.home(work)
        checkpoint, store = home / "checkpoint", home / "store"
        if not manifests.is_store(store):
            write_store(folder, name, comparison.scheme, checkpoint, store)
        manifest = manifests.load(store)
        total = manifest.experts_bytes + manifest.dense_bytes
        caps: list[float] = [cap_for(manifest, n) for n in comparison.slots]
        caps = caps or [share * total for share in comparison.caps]
        base = replace(
            job(routing, checkpoint, store),
            read_bytes_per_second=comparison.read_bytes_per_second,
            decode_seconds=comparison.decode_seconds,
        )
        jobs = [
            replace(limited, system=system)
            for limited in (with_cap(base, manifest, cap) for cap in caps if fits(cap))
            for system in comparison.systems
        ]
        if not jobs:
            raise FlashMoEError(f"this machine has not the memory for {name} at any of those caps")
        if fits(total) and checkpoint.exists() and not comparison.read_bytes_per_second:
            jobs.append(replace(base, system=speedups.REFERENCE))
        title = title_of("speedups", name, comparison.scheme, comparison.label)
        rows = measure(folder, title, jobs, comparison.rounds, comparison.until)
        _tell_uneven(rows)
        publish_tokens(folder, title, jobs, comparison.rounds)
        source = routing.trace.stem if comparison.routing else SHIPPED
        publish(folder, title, label_rows(rows, name, source, routing, total), command)
        if comparison.timelines and speedups.OURS in comparison.systems and not comparison.label:
            _timelines(folder, name, with_cap(base, manifest, caps[len(caps) // 2]))


def write_store(folder: Path, name: str, scheme: str, checkpoint: Path, store: Path) -> None:
    """A store of random weights; through a checkpoint where the reference run fits in memory."""
    say(f"writing {name} with random weights")
    if fits(total_bytes(name)) and scheme == quant.NONE:
        packing = random_stores.write_through_checkpoint(name, checkpoint, store)
        report.write(folder, f"packing-{name}", [packing])
    else:  # `accelerate-disk` alone would need the checkpoint
        synthesise_store(name, store, quant=scheme)


def _tell_uneven(rows: list[dict[str, Any]]) -> None:
    """Say which systems had some tokens much slower than most, as those do that are not warm."""
    for row in rows:
        speed, median_ms = row.get("tokens_per_second"), row.get("token_median_ms")
        if speed and median_ms and 1e3 / median_ms > UNEVEN_RATIO * speed:
            say(
                f"{row['system']}: some tokens were much slower than most ({speed:.2f} token/s, "
                f"{1e3 / median_ms:.2f} by its median token); if it was not warm yet, more "
                "--decode-seconds help"
            )


def title_of(kind: str, name: str, scheme: str, label: str = "") -> str:
    """What a table is called; bf16, and no label, go without saying."""
    return "-".join(
        [kind, name, *(part for part in (scheme, label) if part not in ("", quant.NONE))]
    )


def measure(
    folder: Path, title: str, jobs: list[Job], rounds: int, until: float | None = None
) -> list[dict[str, Any]]:
    """Rows of the jobs; an interrupted table goes on where it was, until it is published."""
    short = (jobs[0].decode_seconds or DECODE_SECONDS) < DECODE_SECONDS
    drive = speedups.drive_of(jobs[0].store, FIO_SECONDS / 2 if short else FIO_SECONDS)
    again_seconds = disturbance.QUICK_AGAIN_SECONDS if short else disturbance.AGAIN_SECONDS
    repeater = Repeater(again_seconds, say)
    return speedups.table(jobs, rounds, drive, say, repeater, journal(folder, title), until)


def publish(folder: Path, title: str, rows: list[dict[str, Any]], command: str) -> None:
    """Write the table and where it came from."""
    report.write(folder, title, rows)
    report.record(folder, title, command, seed=0)
    journal(folder, title).unlink(missing_ok=True)


def publish_tokens(folder: Path, title: str, jobs: Sequence[Job], rounds: int) -> None:
    """Write how long each token of the table took. To be called before the table is published."""
    rows = speedups.tokens(journal(folder, title), jobs, rounds)
    report.write(folder, f"tokens-{title}", rows)


def journal(folder: Path, title: str) -> Path:
    return folder / f".{title}.runs.jsonl"


def job(routing: Routing, checkpoint: Path, store: Path) -> Job:
    """FlashMoE on a model of random weights, by its recorded routing; no limits yet."""
    return Job(
        "flashmoe",
        checkpoint,
        store,
        0,
        "",
        TOKENS,
        routing=routing.trace,
        sequence=routing.sequence,
        prompt_tokens=PROMPT_TOKENS,
        warm_up_tokens=WARM_UP_TOKENS,
        decode_seconds=DECODE_SECONDS,
    )


def label_rows(
    rows: list[dict[str, Any]], name: str, source: str, routing: Routing, total_bytes: int
) -> list[dict[str, Any]]:
    """Rows that say of which model they are, whose routing it had, and how large the cap was."""
    text = f"{source}: {routing.sequence}"
    shares = [row["cap_bytes"] and round(row["cap_bytes"] / total_bytes, 3) for row in rows]
    return [
        {"model": name, "routing": text, "cap_share": share} | row
        for share, row in zip(shares, rows, strict=True)
    ]


def against_bf16(row: dict[str, Any], plain: dict[str, Any], contents: Manifest) -> dict[str, Any]:
    """A row beside that of bf16 under the same limit: how many times as fast, median and range.

    Without the columns that compare systems on one set of weights.
    """
    compared = "flashmoe_speedup", "tokens_differing", "same_output"
    return {
        "expert_bytes": contents.layers[0].extent_bytes,
        "over_bf16": row["tokens_per_second"] / plain["tokens_per_second"],
        "over_bf16_min": row["tokens_per_second_min"] / plain["tokens_per_second_max"],
        "over_bf16_max": row["tokens_per_second_max"] / plain["tokens_per_second_min"],
    } | {column: value for column, value in row.items() if not column.startswith(compared)}


def cap_for(manifest: Manifest, slots: int) -> int:
    """The cap that pays for `slots` experts of every layer and spare ones.

    FlashMoE takes its bypass slots from these.
    """
    layers = manifest.layers
    experts = slots * sum(layer.extent_bytes for layer in layers) + SPARES * layers[0].extent_bytes
    return manifest.dense_bytes + BESIDE_BYTES + experts


def with_cap(job: Job, manifest: Manifest, cap_bytes: float) -> Job:
    """`job` under a limit; what that leaves for experts."""
    memory_bytes = int(cap_bytes) - manifest.dense_bytes - BESIDE_BYTES
    return replace(job, cap_bytes=int(cap_bytes), memory_bytes=memory_bytes)


def _timelines(folder: Path, name: str, job: Job) -> None:
    """One token with and without guesses, as the job's caps have it."""
    rows = []
    for system in ("flashmoe-no-prefetch", "flashmoe"):
        run = run_alone(replace(job, system=system, timeline=True))
        rows += [
            {"system": system, "what": what, "start_ms": 1e3 * start, "end_ms": 1e3 * end}
            for what, start, end in run.get("timeline", ())
        ]
    report.write(folder, f"timeline-{name}", rows)


def fits(size_bytes: float) -> bool:
    """Does this machine's memory hold so much, with some to spare?"""
    return bool(size_bytes + BESIDE_BYTES < psutil.virtual_memory().total * 0.9)
