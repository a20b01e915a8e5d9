"""Which MoE families of transformers are streamed with transformers' own output."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers

import flashmoe
from baselines.in_memory import with_own_memory
from flashmoe.errors import FlashMoEError
from flashmoe.store.manifest import Manifest
from flashmoe.store.pack import pack
from harness import tiny_models

LARGEST_DIFFERENCE = 1e-5  # of float32 logits
PROMPT_TOKENS = 12

# Those that are refused, and why.
EXPLAINED = {
    "diffusion_gemma": "its encoder's and decoder's experts are the same tensors, of which a "
    "checkpoint holds one copy; a store has no experts that two layers share",
    "ernie4_5_vl_moe": "its checkpoints number the experts for text and for images in one row, "
    "which cannot be taken apart expert by expert",
}
DOCUMENT = Path(__file__).parents[1] / "docs" / "families.md"


def examine(family: str) -> dict[str, Any]:
    """Save a tiny model, pack it, stream it at the smallest budget, compare it with eager."""
    model = tiny_models.make(family)
    row = {"family": family, "architecture": type(model).__name__}
    ids = torch.randint(3, 120, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1))
    with TemporaryDirectory() as work, torch.inference_mode():
        checkpoint, store = Path(work) / "checkpoint", Path(work) / "store"
        model.save_pretrained(checkpoint)
        eager = with_own_memory(
            type(model).from_pretrained(
                checkpoint, experts_implementation="eager", dtype=torch.float32
            )
        )
        expected = _output(eager(input_ids=ids))
        try:
            manifest = pack(checkpoint, store)
        except FlashMoEError as error:
            return row | {"outcome": EXPLAINED.get(family, str(error))}
        given, stats = _run(store, manifest, ids)
        try:
            in_place = torch.equal(_run(checkpoint, manifest, ids)[0], given)
        except FlashMoEError as error:
            if "flashmoe pack" not in str(error):
                raise
            in_place = None
    difference = float((given - expected).abs().max())
    return row | {
        "moe_layers": len(manifest.layers),
        "requests": stats["requests"],
        "misses": stats["misses"],
        "largest_difference": difference,
        "in_place": in_place,  # None: its layout must be converted
        "outcome": "ok" if difference <= LARGEST_DIFFERENCE else "differs",
    }


def _output(result: Any) -> torch.Tensor:
    found: torch.Tensor = result["logits" if "logits" in result else "last_hidden_state"]
    return found


def _run(path: Path, manifest: Manifest, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    model = _smallest(path, manifest)
    try:
        return _output(model(input_ids=ids)), model.flashmoe.stats()
    finally:
        model.flashmoe.close()


def _smallest(path: Path, manifest: Manifest) -> transformers.PreTrainedModel:
    """Loaded with slots for one event, of one layer if layers can share them, else of each."""
    sizes = [layer.extent_bytes for layer in manifest.layers]
    try:
        return flashmoe.load(path, memory=manifest.top_k * max(sizes), policy="lru")
    except FlashMoEError as error:
        if "too small" not in str(error):
            raise
        return flashmoe.load(path, memory=manifest.top_k * sum(sizes), policy="lru")


def write(rows: list[dict[str, Any]], document: Path = DOCUMENT) -> None:
    """docs/families.md, in words and numbers."""
    works = [row for row in rows if row["outcome"] == "ok"]
    lines = [
        "# Families",
        "",
        "Written by `python -m harness families`; tests/test_families.py holds every line to it. "
        f"Of the {len(rows)} model types whose experts go through `ExpertsInterface` in "
        f"transformers {transformers.__version__}, {len(works)} are streamed with transformers' "
        "own output: a tiny random checkpoint each, in the layout in which transformers saves it, "
        "float32, the smallest budget that holds one event, compared with `eager`. `in place`: the "
        "checkpoint needs no packing, and gives the same bits.",
        "",
        "| family | architecture | MoE layers | largest difference of logits | in place | |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = "| |"
        if "moe_layers" in row:
            in_place = "pack it" if row["in_place"] is None else "yes"
            numbers = f"{row['moe_layers']} | {row['largest_difference']:.1g} | {in_place}"
        said = "" if row["outcome"] == "ok" else row["outcome"]
        lines.append(f"| {row['family']} | {row['architecture']} | {numbers} | {said} |")
    document.write_text("\n".join(lines) + "\n")
