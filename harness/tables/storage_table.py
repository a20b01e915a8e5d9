"""One model on storage of several classes: the kernel slows the drive to each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from flashmoe.errors import FlashMoEError
from flashmoe.store import manifest as manifests
from harness.progress import say
from harness.report import report
from harness.runs import storage_classes
from harness.tables import full_scale, speedups
from harness.tables.full_scale import FIO_SECONDS, SHIPPED, Comparison


def storage(folder: Path, command: str, comparison: Comparison, names: list[str]) -> None:
    """Write the table of `comparison` at each class of storage, and where it came from.

    A class that is faster than the drive is left out. Raises FlashMoEError for an unknown class,
    where none is left, and where fio is missing, by which the drive is known.
    """
    storage_classes.check_known(names)
    name = comparison.model
    routing = comparison.routing or full_scale.shipped_routing(name)
    with report.scratch(comparison.stores or folder) as work:
        home = comparison.home(work)
        checkpoint, store = home / "checkpoint", home / "store"
        if not manifests.is_store(store):
            full_scale.write_store(folder, name, comparison.scheme, checkpoint, store)
        drive = speedups.drive_of(store, FIO_SECONDS)
        if drive is None:
            raise FlashMoEError("fio is missing: install it, to see which classes this drive is")
        speeds = storage_classes.within(names, drive(), say)
        manifest = manifests.load(store)
        total = manifest.experts_bytes + manifest.dense_bytes
        caps = [share * total for share in comparison.caps if full_scale.fits(share * total)]
        base = full_scale.job(routing, checkpoint, store)
        base = replace(base, decode_seconds=comparison.decode_seconds)
        jobs = [
            replace(
                full_scale.with_cap(base, manifest, cap),
                system=system,
                read_bytes_per_second=speed,
            )
            for speed in speeds.values()
            for cap in caps
            for system in comparison.systems
        ]
        if not jobs:
            raise FlashMoEError(f"this machine has not the memory for {name} at any of those caps")
        title = full_scale.title_of("storage", name, comparison.scheme, comparison.label)
        rows = full_scale.measure(folder, title, jobs, comparison.rounds)
        full_scale.publish_tokens(folder, title, jobs, comparison.rounds)
        source = routing.trace.stem if comparison.routing else SHIPPED
        rows = full_scale.label_rows(rows, name, source, routing, total)
        classes = {speed: name for name, speed in speeds.items()}
        rows = [{"storage": classes[row["read_limit_bytes_per_second"]]} | row for row in rows]
        full_scale.publish(folder, title, rows, command)
