"""`memory=` is a promise: measured by the kernel, page cache included, under a real limit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from harness.runs.memory_cap import memory_cap

MIB = 1 << 20
SLACK_BYTES = 24 * MIB  # what two runs of the same Python process differ by

RUN = """
import json, sys
from pathlib import Path
import torch
import flashmoe
from harness.runs.page_cache import cached_bytes
from flashmoe.store import manifest
torch.set_num_threads(1)
store, memory = Path(sys.argv[1]), int(sys.argv[2])
model = flashmoe.load(store, memory=memory, policy="learned")
ids = torch.arange(3, 200)[None]
mask = torch.ones_like(ids)
tokens = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
stats = model.flashmoe.stats()
print(json.dumps({
    "tokens": tokens[0].tolist(), "resident": stats["resident_bytes"], "misses": stats["misses"],
    "cached": cached_bytes(store / manifest.load(store).experts_file),
}))
"""


def run(store: Path, memory_bytes: int, limit_bytes: int | None):
    with memory_cap(limit_bytes) as cap:
        if cap is None:
            pytest.skip("no memory cgroup can be made here")
        done = subprocess.run(
            [sys.executable, "-c", RUN, store, str(memory_bytes)],
            capture_output=True, text=True, preexec_fn=cap.enter,
        )  # fmt: skip
        return done, cap.peak_bytes()


def test_more_memory_is_used_only_as_given(large_store):
    least, most = 4 * 6 * MIB, 30 * 6 * MIB  # 4 slots and 30 of 32
    run(large_store, least, None)  # fills the page cache with Python's own files
    done, floor_bytes = run(large_store, least, None)
    small = json.loads(done.stdout)
    assert small["resident"] == least
    assert small["cached"] == 0

    # exactly as much more as was given, and the kernel kills whoever takes more
    limit = floor_bytes + (most - least) + SLACK_BYTES
    done, peak_bytes = run(large_store, most, limit)
    assert done.returncode == 0, done.stderr[-500:]
    large = json.loads(done.stdout)
    assert large["tokens"] == small["tokens"]
    assert large["resident"] <= most
    assert large["cached"] == 0
    assert large["misses"] < small["misses"]
    assert peak_bytes <= limit

    # and the limit is real: the same run with half of the budget's room is killed
    tight, _ = run(large_store, most, floor_bytes + (most - least) // 2 - SLACK_BYTES)
    assert tight.returncode != 0
