"""Routing of small models of other geometries: `python -m harness.demo.geometries OUT`.

Trains each briefly on the demo model's text, records what it chooses on held-out text, and
writes flashmoe/routing/NAME.npz; the models themselves stay in OUT. The first four stand for
real models of the same layers, experts and top_k, whose weights do not fit a package.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer, OlmoeForCausalLM

from flashmoe.engines.transformers.recorder import record
from harness.demo import corpus, train

ROUTING = Path(__file__).parents[2] / "flashmoe" / "routing"
TOKENS = 256  # of each held-out document


class Geometry(NamedTuple):
    layers: int
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    steps: int  # of train.TOKENS_PER_STEP tokens
    documents: int  # of each kind, recorded


GEOMETRIES = {
    "gpt-oss-20b": Geometry(24, 32, 4, 128, 64, 250, 4),
    "deepseek-v2-lite": Geometry(26, 64, 6, 128, 48, 400, 4),
    "qwen3-30b-a3b": Geometry(48, 128, 8, 96, 32, 100, 3),
    "mixtral-8x7b": Geometry(32, 8, 2, 128, 128, 200, 4),
    "8x256-top10": Geometry(8, 256, 10, 128, 32, 200, 4),
    "8x128-top1": Geometry(8, 128, 1, 128, 128, 250, 4),
    "12x16-top3": Geometry(12, 16, 3, 128, 128, 250, 4),
}


def sizes(geometry: Geometry) -> dict[str, Any]:
    return dict(
        num_hidden_layers=geometry.layers,
        num_experts=geometry.experts,
        num_experts_per_tok=geometry.top_k,
        hidden_size=geometry.hidden,
        intermediate_size=geometry.intermediate,
        norm_topk_prob=geometry.top_k > 1,  # else the router of a top-1 model learns nothing
    )


def ship(name: str, folder: Path, cache: Path) -> None:
    """Record held-out documents of every kind with the trained model, with weights."""
    geometry = GEOMETRIES[name]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = OlmoeForCausalLM.from_pretrained(
        folder / "model", experts_implementation="grouped_mm"
    ).eval()
    names, prompts = [], []
    for kind, texts in corpus.load(cache, held_out=True).items():
        long = [ids for text in texts if len(ids := tokenizer(text)["input_ids"]) >= TOKENS]
        for number in range(geometry.documents):
            ids = long[number * len(long) // geometry.documents]
            names.append(f"{kind}-{number}")
            prompts.append(torch.tensor(ids[:TOKENS]))
    progress = json.loads((folder / "progress.json").read_text())
    info = {
        "model": f"a small model of the geometry of {name}",
        "phase": "prefill of held-out text, in token order (a teacher-forced decode)",
        "source": "python -m harness.demo.geometries",
        "trained_tokens": progress["steps"] * train.TOKENS_PER_STEP,
        "names": names,
    }
    trace = record(model, prompts, max_new_tokens=0, guesses=True, info=info)
    trace.step = None  # the replay's events are single tokens
    ROUTING.mkdir(exist_ok=True)
    trace.save(ROUTING / f"{name}.npz")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", default=list(GEOMETRIES))
    parser.add_argument("--corpus", type=Path, default=Path("corpus"))
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=20261124)
    arguments = parser.parse_args()
    train.restart_with_huge_pages("harness.demo.geometries")
    for name in arguments.names:
        folder, geometry = arguments.out / name, GEOMETRIES[name]
        if not (folder / "progress.json").exists():
            train.train(
                folder,
                arguments.corpus,
                geometry.steps,
                arguments.learning_rate,
                arguments.seed,
                sizes(geometry),
            )
        ship(name, folder, arguments.corpus)


if __name__ == "__main__":
    main()
