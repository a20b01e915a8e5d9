"""What loads quickly stays quick: these modules load neither torch nor a library of an engine."""

from __future__ import annotations

import subprocess
import sys

from source_tree import ROOT

import flashmoe

HEAVY = ("torch", "transformers", "llama_cpp", "gguf", "elftools")
LIGHT = (
    "flashmoe", "flashmoe.cli.simulate", "flashmoe.cache.expert_cache",
    "flashmoe.cache.replays", "flashmoe.cache.simulate", "flashmoe.disk.files",
    "flashmoe.disk.plain_npz", "flashmoe.events", "flashmoe.policies",
    "flashmoe.policies.parts.policy_file", "flashmoe.reading.read_queue", "flashmoe.trace",
    "flashmoe.train.decisions", "flashmoe.util.registry", "flashmoe.util.sizes",
)  # fmt: skip


def heavy_after(*statements: str) -> str:
    """The first heavy library that a new interpreter loads, and the statement that loads it."""
    script = f"""
import sys
for statement in {statements!r}:
    exec(statement)
    for name in {HEAVY!r}:
        if sys.modules.get(name):
            sys.exit(f"HEAVY {{name}} by {{statement}}")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    if "HEAVY" in done.stderr:
        return done.stderr.splitlines()[-1]
    assert done.returncode == 0, done.stderr
    return ""


def test_light_modules_load_no_heavy_library():
    assert heavy_after(*(f"import {module}" for module in LIGHT)) == ""


def test_policies_and_a_simulation_load_no_heavy_library():
    routing = str(flashmoe.demo_routing_path())
    arguments = ["simulate", routing, "--policy", "lru", "--capacity", "0.5", "--json"]
    loaded = heavy_after(
        "from flashmoe import policies; policies.available()",
        f"from flashmoe import cli; assert cli.main({arguments}) == 0",
    )
    assert loaded == ""


def test_a_heavy_library_would_be_seen():
    loaded = heavy_after("pass", "import types; sys.modules['torch'] = types")
    assert loaded.startswith("HEAVY torch by import types")
