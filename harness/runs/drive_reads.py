"""Reads stores' experts in turn, alone in this process: `python -m harness.runs.drive_reads JOB`.

JOB is a JSON object: stores, a folder for each layout; seconds a measurement; rounds. Prints a JSON
list with an object for each layout, round and depth: bytes a second, and bytes of each drive.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from flashmoe.disk.direct_io import aligned_memory
from flashmoe.reading.packed import PackedExperts
from flashmoe.reading.reader import ExtentReader
from flashmoe.store.shares import Range

WHOLE = "mirrored, whole pieces"
DEPTHS = (1, 4)  # experts that are asked for at once
_EXPERTS = 32  # of the first layer; each is read from each copy before it is measured


class _WholePieces(PackedExperts):
    """As if there were one drive: an expert is not cut so that each drive has a part."""

    def parts(self, layer: int) -> list[Range]:
        return [(0, self.manifest.layers[layer].extent_bytes)]


class _Bench:
    def __init__(self, layout: str, store: Path) -> None:
        backend = (_WholePieces if layout == WHOLE else PackedExperts)(store)
        self.reader = ExtentReader(backend)
        layer = backend.manifest.layers[0]
        self.size_bytes, self.n_experts = layer.extent_bytes, min(_EXPERTS, layer.n_experts)
        memory = memoryview(aligned_memory(self.size_bytes * max(DEPTHS)))
        self.slots = [
            memory[i * self.size_bytes : (i + 1) * self.size_bytes] for i in range(max(DEPTHS))
        ]
        for _ in range(backend.n_copies):  # first reads are checked, and come from one copy whole
            for expert in range(self.n_experts):
                self.reader.submit(0, [(expert, self.slots[0])])[0].result()

    def measure(self, depth: int, seconds: float) -> dict[str, Any]:
        before = self.reader.bytes_by_drive
        waiting: deque[tuple[Any, memoryview]] = deque()
        expert = done = 0
        started = time.perf_counter()
        for slot in self.slots[:depth]:
            waiting.append((self.reader.submit(0, [(expert, slot)])[0], slot))
            expert += 1
        while waiting:
            read, slot = waiting.popleft()
            read.result()
            done += 1
            if time.perf_counter() - started < seconds:
                expert = (expert + 1) % self.n_experts
                waiting.append((self.reader.submit(0, [(expert, slot)])[0], slot))
        taken = time.perf_counter() - started
        read_bytes = self.reader.bytes_by_drive
        return {
            "depth": depth,
            "bytes_per_second": done * self.size_bytes / taken,
            "bytes_by_drive": [b - a for a, b in zip(before, read_bytes, strict=True)],
        }


def main(job: dict[str, Any]) -> list[dict[str, Any]]:
    benches = {layout: _Bench(layout, Path(store)) for layout, store in job["stores"].items()}
    rows = [
        {"layout": layout, "round": number} | bench.measure(depth, job["seconds"])
        for number in range(job["rounds"])
        for depth in DEPTHS
        for layout, bench in benches.items()
    ]
    for bench in benches.values():
        bench.reader.close()
    return rows


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))), flush=True)
