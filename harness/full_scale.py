"""The generation table at a real model's size: synthetic weights, recorded routing."""

from __future__ import annotations

from pathlib import Path

import flashmoe
from flashmoe.store.pack import pack
from flashmoe.synth import synthesise
from harness import plots, provenance, report, speedups, ssd
from harness.reproduce import say, scratch
from harness.run import Job

MODEL = "olmoe-1b-7b"
SLOTS = [8, 16, 24, 32, 40]
TOKENS, WARM_UP_TOKENS, ROUNDS = 16, 24, 3


def full_scale(folder: Path, command: str, stores: Path | None = None) -> None:
    """Write checkpoint and store (27 GB, given back afterwards), run, write the table.

    `stores` keeps them: a directory with `checkpoint` and `store`, made there if absent.
    """
    with scratch(stores or folder) as work:
        home = stores or work
        checkpoint, store = home / "checkpoint", home / "store"
        if not checkpoint.exists():
            say(f"writing {MODEL} with random weights")
            synthesise(MODEL, checkpoint)
        if not store.exists():
            say("packing it")
            pack(checkpoint, store)
        drive = None
        if ssd.fio_path():
            with ssd.test_file(work) as path:
                engine = ssd.working_engine(path)
                speeds = [
                    ssd.fio(path, ssd.EXTENT_BYTES[MODEL], depth, "random", engine, 5.0)
                    for depth in (1, 4)
                ]
                drive = max(row["bytes_per_second"] for row in speeds)
                say(f"fio, random reads of 12 MiB: {drive / 1e9:.2f} GB/s")
        base = Job(
            "flashmoe-lru",
            checkpoint,
            store,
            0,
            "",
            TOKENS,
            routing=flashmoe.demo_routing_path(),
            warm_up_tokens=WARM_UP_TOKENS,
        )
        rows = speedups.table(speedups.jobs_for(base, SLOTS), ROUNDS, drive, say)
    speedups.mark_equal(rows)
    for row in rows:
        del row["text"]
    frame = report.write(folder, "full_scale", rows)
    plots.generation(
        frame, folder, "full_scale",
        "OLMoE-1B-7B's shapes, synthetic weights, recorded routing: where a token's time goes",
    )  # fmt: skip
    record = provenance.gather(command, folder, drive_bytes_per_second=drive, seed=0)
    report.provenance(folder, "full_scale", record)
