"""A small folder of results: rows of speed tables, and a record that holds a script."""

from __future__ import annotations

from pathlib import Path

from harness.report import report

EVIL = "<script>alert(1)</script>"
RECORD = {
    "command": f"python -m harness full-scale m {EVIL}", "date": "2026-11-26", "commit": "0" * 40,
    "uncommitted_changes": False, "versions": {"torch": "2"}, "seed": 7,
    "machine": {"cpu": f"Some CPU {EVIL}", "cores": 2, "memory_gib": 24, "file_system": "ext4"},
}  # fmt: skip


def row(system: str, cap: float, speed: float | None, over=(1, 1, 1), **more) -> dict:
    """As the tables of speeds have them; `over`: FlashMoE's speed over this one's."""
    speeds = (speed, speed and speed * 0.9, speed and speed * 1.1)
    names = ("", "_min", "_max")
    return (
        {"model": "m", "routing": "shipped: a", "cap_share": cap, "system": system, "outcome": "ok",
         "cap_bytes": 4e9, "slots": 2, "hit_rate": 0.5, "rounds": 2}
        | {f"tokens_per_second{name}": value for name, value in zip(names, speeds, strict=True)}
        | {f"flashmoe_speedup{name}": value for name, value in zip(names, over, strict=True)}
        | more
    )  # fmt: skip


def make() -> Path:
    """Two tables of one machine: at 25 % FlashMoE is first, at 120 % a peer of the other table."""
    folder = report.RESULTS / "here-avx2-full-scale"
    killed = {"outcome": f"out of memory {EVIL}", "rounds": 0}
    rows = [
        row("flashmoe", 0.25, 4), row("daop", 0.25, 2, (2, 1.8, 2.2)),
        row("fiddler", 0.25, None, (None,) * 3, **killed),
        row("flashmoe", 1.2, 8), row("daop", 1.2, 8, (1, 0.9, 1.1)),
        row("flashmoe-fast", 1.2, 10, (0.8, 0.7, 0.9)),
    ]  # fmt: skip
    report.write(folder, "speedups-m", rows)
    # another day: both are faster, and so this peer's ratio must come from its own table
    others = [row("flashmoe", 1.2, 16), row("llama-cpp", 1.2, 32, (0.5, 0.4, 0.6))]
    report.write(folder, "speedups-m-others", others)
    report.provenance(folder, "speedups-m", RECORD)
    report.provenance(folder, "speedups-m-others", RECORD)
    return folder
