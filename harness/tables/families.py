"""Which MoE families of transformers are streamed with transformers' own output."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers

import flashmoe
from baselines.in_memory import with_own_memory
from flashmoe.engines.transformers.checkpoints.pack import pack
from flashmoe.errors import FlashMoEError
from flashmoe.store.manifest import Manifest
from harness import tiny_models

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 4, 12, 3

# What is not streamed, and why: a family, or one in a dtype.
EXPLAINED = {
    "diffusion_gemma": "its encoder's and decoder's experts are the same tensors, of which a "
    "checkpoint holds one copy; a store has no experts that two layers share",
    "ernie4_5_vl_moe": "its checkpoints number the experts for text and for images in one row, "
    "which cannot be taken apart expert by expert",
    "deepseek_v4 in float16": "transformers' own code multiplies float16 by float32, which torch "
    "refuses",
}
DOCUMENT = Path(__file__).parents[2] / "docs" / "families.md"
Outputs = list[torch.Tensor]


def examine(family: str) -> dict[str, Any]:
    """Compare a tiny model in every dtype with eager; each dtype's entry is its outcome."""
    model = tiny_models.make(family)
    row: dict[str, Any] = {"family": family, "architecture": type(model).__name__}
    for name, dtype in DTYPES.items():
        comparison = _compare(tiny_models.cast(model, dtype), dtype)
        outcome = comparison.pop("outcome")
        if outcome != "equal":
            explanations = (EXPLAINED.get(key) for key in (family, f"{family} in {name}"))
            outcome = next(filter(None, explanations), outcome)
        row |= comparison | {name: outcome}
    return row


@torch.inference_mode()
def _compare(model: transformers.PreTrainedModel, dtype: torch.dtype) -> dict[str, Any]:
    """Save `model`, pack it, stream it at the smallest budget, and in place as well.

    outcome: "equal" when all is eager's bit for bit, or what differs or went wrong.
    """
    with TemporaryDirectory() as work:
        checkpoint, store = Path(work) / "checkpoint", Path(work) / "store"
        model.save_pretrained(checkpoint)
        try:
            manifest = pack(checkpoint, store)
        except FlashMoEError as error:
            return {"outcome": str(error)}
        plain = type(model).from_pretrained(checkpoint, experts_implementation="eager", dtype=dtype)
        try:
            expected = _outputs(with_own_memory(plain))
        except RuntimeError as error:
            return {"outcome": f"transformers' own model fails ({error})"}
        packed, stats = _run(store, manifest)
        comparison = {"moe_layers": len(manifest.layers), "misses": stats["misses"]}
        differing = _differing(expected, packed, "packed")
        try:
            in_place, _ = _run(checkpoint, manifest)
            comparison["in_place"] = True
            differing += _differing(expected, in_place, "in place")
        except FlashMoEError as error:
            if "flashmoe pack" not in str(error):
                raise
            comparison["in_place"] = False  # its layout must be converted
    return comparison | {"outcome": "; ".join(differing) or "equal"}


def _outputs(model: transformers.PreTrainedModel) -> Outputs:
    """Of a batch of prompts at once; and of one of them, and of all, continued token by token."""
    ids = torch.randint(
        3, 120, (PROMPTS, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1)
    )
    result = model(input_ids=ids)
    outputs = [tiny_models.output(result)]
    if model.can_generate():
        for prompts in (ids[:1], ids):
            generated = model.generate(
                prompts, attention_mask=torch.ones_like(prompts), do_sample=False,
                min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
            outputs += [generated.sequences, torch.stack(generated.logits)]
    return outputs


def _differing(expected: Outputs, outputs: Outputs, where: str) -> list[str]:
    names = ("prompt", "tokens of one", "logits of one", "tokens of a batch", "logits of a batch")
    return [
        f"{where}, {name} differs by {float((ours.float() - theirs.float()).abs().max()):.2g}"
        for name, ours, theirs in zip(names, outputs, expected, strict=False)
        if not torch.equal(ours, theirs)
    ]


def _run(path: Path, manifest: Manifest) -> tuple[Outputs, dict[str, Any]]:
    model = _smallest(path, manifest)
    try:
        return _outputs(model), model.flashmoe.stats()
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
    streamed = [row for row in rows if row["float32"] == "equal"]
    lines = [
        "# Families",
        "",
        "Written by `python -m harness families`; tests/model/test_families.py holds every line "
        f"to it. Of the {len(rows)} model types whose experts go through `ExpertsInterface` in "
        f"transformers {transformers.__version__}, {len(streamed)} are streamed with transformers' "
        "own output. `equal`: a tiny random checkpoint in that dtype (its router's bias in "
        "float32), saved by transformers in its own layout and streamed at the smallest budget "
        "that holds one event, gives the logits of `eager` bit for bit, of a batch of prompts and "
        "of tokens generated one by one. `in place`: the checkpoint needs no packing, and gives "
        "the same bits.",
        "",
        "| family | architecture | MoE layers | " + " | ".join(DTYPES) + " | in place | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        outcomes = {name: row[name] for name in DTYPES}
        words = dict.fromkeys(outcome for outcome in outcomes.values() if outcome != "equal")
        in_place = {True: "yes", False: "pack it", None: ""}[row.get("in_place")]
        cells = [
            row["family"], row["architecture"], str(row.get("moe_layers", "")),
            *("equal" if outcome == "equal" else "no" for outcome in outcomes.values()),
            in_place, "; ".join(words),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    document.write_text("\n".join(lines) + "\n")
