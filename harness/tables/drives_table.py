"""What a second drive is worth: two loop devices, each limited alike, against one of them."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from flashmoe.engines.transformers.checkpoints.named_models import config_of, total_bytes
from flashmoe.engines.transformers.checkpoints.random_weights import RandomWeights
from flashmoe.errors import FlashMoEError
from flashmoe.quant import NONE
from flashmoe.store import manifest as manifests
from flashmoe.store.writer import write_store
from harness.progress import Say
from harness.runs.drive_reads import WHOLE
from harness.runs.isolated_run import Run, run_alone
from harness.runs.job import Job
from harness.runs.loop_drives import LoopDrive, loop_drives
from harness.runs.memory_cap import ReadLimit, memory_cap
from harness.tables.full_scale import job as full_scale_job
from harness.tables.full_scale import shipped_routing

MODEL = "olmoe-quarter"
READ_BYTES_PER_SECOND = 200_000_000  # of each device
SECONDS, ROUNDS = 1.5, 3  # of a measurement of the reader
DECODE_SECONDS, DECODE_ROUNDS, PROMPT_TOKENS = 6.0, 2, 8
_SLOTS = 16  # of 64 experts of each layer
_LOST_AFTER_BYTES = 256 << 20
_ROOM = 1.15  # of a file system, over what lies on it


def table(work: Path, say: Say) -> list[dict[str, Any]]:
    """Rows of the reader, of decoding, and of a drive that is lost while it decodes."""
    size_bytes = total_bytes(MODEL)
    if shutil.disk_usage(work).free < 3 * size_bytes:
        raise FlashMoEError(f"{work}: {3 * size_bytes >> 30} GiB of free disk are needed")
    with loop_drives(work, 2, int(size_bytes * _ROOM) + (1 << 30)) as drives:
        say("writing one layer of it, mirrored and striped")
        stores = _small_stores(drives)
        say(f"reading, {READ_BYTES_PER_SECOND / 1e6:.0f} MB/s a device")
        rows = list(_reader_rows(drives, stores))
        say(f"writing {MODEL} onto both")
        mirrored = drives[0].folder / "model"
        _write(mirrored, drives[1].folder / "model")
        return [*rows, *_decode_rows(drives, mirrored, say)]


def _small_stores(drives: list[LoopDrive]) -> dict[str, Path]:
    stores = {name: drives[0].folder / name for name in ("mirrored", "striped")}
    for name, store in stores.items():
        _write(store, drives[1].folder / name, layers=1, stripe=name == "striped")
    one = _alone(stores["mirrored"])
    return {"one drive": one, **stores, WHOLE: stores["mirrored"]}


def _write(store: Path, other: Path, layers: int | None = None, *, stripe: bool = False) -> None:
    config = config_of(MODEL)
    if layers:
        config.num_hidden_layers = layers
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        source = RandomWeights(config, 0)
        write_store(source, Path(folder), store, lambda *_: None, NONE, [other], stripe=stripe)


def _alone(mirrored: Path) -> Path:
    """The same store on its first drive only: the same files, and no folder beside."""
    store = mirrored.with_name(f"{mirrored.name}-alone")
    store.mkdir()
    for path in mirrored.iterdir():
        if path.name not in (manifests.FILE_NAME, ".lock"):
            (store / path.name).hardlink_to(path)
    replace(manifests.load(mirrored), folders_file="").save(store)
    return store


def _reader_rows(drives: list[LoopDrive], stores: dict[str, Path]) -> Iterator[dict[str, Any]]:
    """Each layout and depth: medians of rounds that take turns."""
    job = {"seconds": SECONDS, "rounds": ROUNDS, "stores": {n: str(p) for n, p in stores.items()}}
    limits = [ReadLimit(drive.folder, READ_BYTES_PER_SECOND) for drive in drives]
    with memory_cap(None, limits) as cap:
        done = subprocess.run(
            [sys.executable, "-m", "harness.runs.drive_reads", json.dumps(job)],
            capture_output=True, text=True, preexec_fn=cap.enter if cap else None,
        )  # fmt: skip
    if done.returncode:
        raise FlashMoEError(f"reading failed: {done.stderr.strip().splitlines()[-1]}")
    measured = json.loads(done.stdout.splitlines()[-1])
    one = {(m["depth"], m["round"]): m for m in measured if m["layout"] == "one drive"}
    for depth in sorted({m["depth"] for m in measured}):
        for layout in stores:
            runs = [m for m in measured if (m["depth"], m["layout"]) == (depth, layout)]
            ratios = [
                run["bytes_per_second"] / one[depth, run["round"]]["bytes_per_second"]
                for run in runs
            ]
            shares = [run["bytes_by_drive"] for run in runs if run["bytes_by_drive"]]
            second = sum(s[1] for s in shares) / sum(map(sum, shares)) if shares else 0.0
            yield {
                "what": f"reader, {depth} at once", "layout": layout,
                **_spread("bytes_per_second", [run["bytes_per_second"] for run in runs]),
                **_spread("over_one_drive", ratios), "second_drive_share": second,
                **_common(len(runs)),
            }  # fmt: skip


def _decode_rows(drives: list[LoopDrive], mirrored: Path, say: Say) -> Iterator[dict[str, Any]]:
    extents = [layer.extent_bytes for layer in manifests.load(mirrored).layers]
    base = replace(
        full_scale_job(shipped_routing(MODEL), mirrored, mirrored),
        prompt_tokens=PROMPT_TOKENS,
        memory_bytes=_SLOTS * sum(extents),
        decode_seconds=DECODE_SECONDS,
        read_bytes_per_second=READ_BYTES_PER_SECOND,
    )
    jobs = {"one drive": replace(base, store=_alone(mirrored)), "mirrored": base}
    runs: dict[str, list[Run]] = {layout: [] for layout in jobs}
    counts = [0, 0]
    for _ in range(DECODE_ROUNDS):
        for layout, job in jobs.items():
            before = [drive.read_bytes() for drive in drives]
            runs[layout].append(run_alone(job))
            if layout == "mirrored":
                reads = zip(drives, before, counts, strict=True)
                counts = [drive.read_bytes() - b + c for drive, b, c in reads]
            say(f"decode, {layout}: {runs[layout][-1]['tokens_per_second']:.2f} token/s")
    for layout, mine in runs.items():
        speeds = [run["tokens_per_second"] for run in mine]
        ones = [run["tokens_per_second"] for run in runs["one drive"]]
        ratios = [a / b for a, b in zip(speeds, ones, strict=True)]
        yield {
            "what": "decode", "layout": layout, **_spread("tokens_per_second", speeds),
            **_spread("over_one_drive", ratios),
            "second_drive_share": counts[1] / sum(counts) if layout == "mirrored" else 0.0,
            "same_output": _same(mine[0], runs["one drive"][0]), **_common(len(mine)),
        }  # fmt: skip
    lost = _losing(drives[1], base)
    say(f"decode, the second drive lost on the way: {lost['tokens_per_second']:.2f} token/s")
    yield {
        "what": "decode, a drive lost", "layout": "mirrored",
        **_spread("tokens_per_second", [lost["tokens_per_second"]]),
        "same_output": _same(lost, runs["one drive"][0]), **_common(1),
    }  # fmt: skip


def _losing(drive: LoopDrive, job: Job) -> Run:
    """A run in the midst of which `drive` fails for good."""
    before, over, lost = drive.read_bytes(), threading.Event(), threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            if drive.read_bytes() >= before + _LOST_AFTER_BYTES:
                drive.lose()
                lost.set()
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        run = run_alone(job)
    finally:
        over.set()
        thread.join()
    if not lost.is_set():
        raise FlashMoEError("the second drive was read too little to be lost on the way")
    return run


def _same(run: Run, other: Run) -> bool:
    """The tokens that both have; slower runs stop earlier."""
    pairs = zip(run["token_ids"], other["token_ids"], strict=False)
    return all(mine == theirs for mine, theirs in pairs)


def _spread(name: str, values: list[float]) -> dict[str, float]:
    return {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def _common(rounds: int) -> dict[str, Any]:
    return {
        "read_limit_bytes_per_second": READ_BYTES_PER_SECOND, "rounds": rounds, "model": MODEL,
        "cores": os.cpu_count(),
    }  # fmt: skip
