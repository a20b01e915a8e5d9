"""What fewer bytes an expert bring in speed, at a real model's size, and cost in quality."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import flashmoe
from flashmoe import quant
from flashmoe.engines.transformers.checkpoints.named_models import total_bytes
from flashmoe.engines.transformers.checkpoints.pack import pack
from flashmoe.store import manifest as manifests
from harness.demo import corpus, train
from harness.demo.describe import EVALUATED_TOKENS, perplexity
from harness.progress import say
from harness.report import report
from harness.runs.budget import budget_for
from harness.tables import full_scale, random_stores

SCHEMES = (quant.NONE, *quant.quantisers())
CAPS = (0.25, 0.4)


def speed(
    folder: Path,
    command: str,
    name: str,
    *,
    caps: Sequence[float] = CAPS,
    rounds: int = 2,
    stores: Path | None = None,
) -> None:
    """Every scheme at the same caps, shares of the bf16 model's size; interleaved."""
    routing = full_scale.shipped_routing(name)
    total = total_bytes(name)
    with report.scratch(stores or folder) as work:
        paths = random_stores.of_schemes(name, SCHEMES, stores or work)
        contents = {scheme: manifests.load(store) for scheme, store in paths.items()}
        cases = [(share, scheme) for share in caps for scheme in SCHEMES]
        jobs = [
            full_scale.with_cap(
                full_scale.job(routing, paths[scheme], paths[scheme]),
                contents[scheme],
                share * total,
            )
            for share, scheme in cases
        ]
        title = f"quant-{name}"
        measurements = full_scale.measure(folder, title, jobs, rounds)
    rows = []
    for (share, scheme), row in zip(cases, measurements, strict=True):
        plain = measurements[cases.index((share, quant.NONE))]
        kinds = {"model": name, "cap_share": share, "quant": scheme}
        rows.append(kinds | full_scale.against_bf16(row, plain, contents[scheme]))
    full_scale.publish(folder, title, rows, command)


def perplexities(folder: Path, command: str, texts: Path) -> None:
    """Perplexity of the demo model on held-out documents of every kind, under each scheme.

    texts: where harness.demo.corpus keeps what it fetches (from Debian's packages).
    """
    path = flashmoe.demo_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    held_out = {
        kind: train.encode(tokenizer, documents)[:EVALUATED_TOKENS]
        for kind, documents in corpus.load(texts, held_out=True).items()
    }
    whole = AutoModelForCausalLM.from_pretrained(path, experts_implementation="eager")
    plain = {kind: perplexity(whole, stream) for kind, stream in held_out.items()}
    rows: list[dict[str, Any]] = []
    with report.scratch(folder) as work:
        for scheme in SCHEMES:
            store = work / scheme
            expert_bytes = pack(path, store, quant=scheme).layers[0].extent_bytes
            model = flashmoe.load(store, memory="1GiB")
            try:
                for kind, stream in held_out.items():
                    value = perplexity(model, stream)
                    rows.append(
                        {
                            "quant": scheme,
                            "expert_bytes": expert_bytes,
                            "kind": kind,
                            "tokens": len(stream),
                            "perplexity": value,
                            "change": value / plain[kind] - 1,
                            "same_as_held": _same_as_held(model, store, stream),
                        }
                    )
                    say(f"{scheme}, {kind}: perplexity {value:.2f} ({rows[-1]['change']:+.2%})")
            finally:
                model.flashmoe.close()
    report.write(folder, "quant-quality", rows)
    report.record(folder, "quant-quality", command)


@torch.inference_mode()
def _same_as_held(model: PreTrainedModel, store: Path, stream: Any) -> bool:
    """Are logits with few slots bit for bit those with all quantised experts in memory?"""
    ids = torch.from_numpy(stream[:64].astype("int64"))[None]
    all_resident = model(ids).logits
    least = flashmoe.load(store, memory=budget_for(store, model.flashmoe.manifest.top_k))
    try:
        return bool(torch.equal(least(ids).logits, all_resident))
    finally:
        least.flashmoe.close()
