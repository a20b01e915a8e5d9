"""Ship a trained demo model with its card and routing: `python -m harness.demo.describe OUT`.

Reads OUT/model (what harness.demo.train wrote) and the held-out documents; writes
flashmoe/demo/: the model, its card, and the routing of held-out text of every kind.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, OlmoeForCausalLM, PreTrainedTokenizerFast

from flashmoe.engines.transformers.recorder import record
from flashmoe.trace import Trace
from harness.demo import corpus, train
from harness.demo.prompts import PROMPTS

DEMO = Path(__file__).parents[2] / "flashmoe" / "demo"
WINDOW = 256
REPETITION_PENALTY = 1.3
EVALUATED_TOKENS = 64 * WINDOW  # of each kind
# Two files, since all probabilities cost 2 KiB a token: a longer one with the weights of the
# chosen experts for replays, a shorter one with the probabilities of all for learning from.
ROUTING = {"routing": (6, 256, False), "routing-probabilities": (1, 160, True)}


@torch.inference_mode()
def perplexity(model: OlmoeForCausalLM, stream: np.ndarray) -> float:
    """exp of the mean loss over disjoint windows, each starting with no context."""
    losses = []
    windows = stream[: len(stream) // WINDOW * WINDOW].reshape(-1, WINDOW).astype(np.int64)
    for batch in torch.from_numpy(windows).split(16):
        logits = model(batch, use_cache=False).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none"
        )
        losses.append(loss)
    return math.exp(torch.cat(losses).mean().item())


def ngram_perplexities(training: np.ndarray, held_out: np.ndarray) -> tuple[float, float]:
    """Unigram (add one) and bigram (interpolated with it) of one kind's whole training text.

    The bigram's weight is the best on the held-out text itself, which flatters it.
    """
    size = train.VOCABULARY
    unigram = (np.bincount(training, minlength=size) + 1) / (len(training) + size)
    pairs = training[:-1].astype(np.int64) * size + training[1:]
    counts = np.bincount(pairs, minlength=size * size).astype(np.float32)
    starts = np.bincount(training[:-1], minlength=size)
    previous, following = held_out[:-1].astype(np.int64), held_out[1:].astype(np.int64)
    bigram = counts[previous * size + following] / np.maximum(starts[previous], 1)
    base = unigram[following]
    best = min(
        float(np.exp(-np.log(w * bigram + (1 - w) * base).mean())) for w in np.arange(0.3, 1, 0.05)
    )
    return float(np.exp(-np.log(base).mean())), best


def load_balance(routing: Trace) -> dict[str, float]:
    """How evenly a trace's requests spread over a layer's experts; means over layers."""
    peaks, entropies, idle = [], [], []
    for load in routing.uses():
        share = load / load.sum()
        peaks.append(share.max() * routing.n_experts)
        used = share[share > 0]
        entropies.append(-(used * np.log(used)).sum() / math.log(routing.n_experts))
        idle.append(float((share == 0).mean()))
    return {
        "busiest_over_mean": float(np.mean(peaks)),
        "normalised_entropy": float(np.mean(entropies)),
        "unused_share": float(np.mean(idle)),
    }


def describe(out: Path, cache: Path) -> None:
    target = DEMO / "model"
    shutil.rmtree(DEMO, ignore_errors=True)
    target.mkdir(parents=True)
    for file in sorted((out / "model").iterdir()):
        shutil.copy(file, target / file.name)
    progress = json.loads((out / "progress.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(target)
    model = OlmoeForCausalLM.from_pretrained(target, experts_implementation="grouped_mm").eval()
    held_out_texts = corpus.load(cache, held_out=True)
    training_texts = corpus.load(cache, held_out=False)
    rows = []
    for kind, texts in held_out_texts.items():
        stream = train.encode(tokenizer, texts)[:EVALUATED_TOKENS]
        unigram, bigram = ngram_perplexities(train.encode(tokenizer, training_texts[kind]), stream)
        rows.append((kind, len(stream), perplexity(model, stream), bigram, unigram))
        print(rows[-1], flush=True)
    model.set_experts_implementation("eager")
    # so small a model repeats itself when greedy, which would also flatter every cache
    model.generation_config.repetition_penalty = REPETITION_PENALTY
    model.generation_config.save_pretrained(target)
    samples = {kind: _continue(model, tokenizer, prompt) for kind, prompt in PROMPTS.items()}
    routing = ship_routing(model, tokenizer, held_out_texts)
    balance = load_balance(routing)
    (DEMO / "README.md").write_text(card(model, progress, rows, balance, samples))


def ship_routing(
    model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: dict[str, list[str]]
) -> Trace:
    """Record held-out documents of every kind into the demo's folder; the longer recording."""
    for name, (sequences, tokens, probabilities) in ROUTING.items():
        names, prompts = [], []
        for kind, documents in texts.items():
            long = [ids for t in documents if len(ids := tokenizer(t)["input_ids"]) >= tokens]
            # spread over the held-out documents, so that neighbours do not share a template
            for number in range(sequences):
                ids = long[number * len(long) // sequences]
                names.append(f"{kind}-{number}")
                prompts.append(torch.tensor(ids[:tokens]))
        trace = record(
            model,
            prompts,
            max_new_tokens=0,
            probabilities=probabilities,
            guesses=not probabilities,
            info={
                "model": "flashmoe demo",
                "phase": "prefill of held-out text, in token order (a teacher-forced decode)",
                "source": "python -m harness.demo.describe",
                "names": names,
            },
        )
        trace.step = None  # the replay's events are single tokens
        trace.save(DEMO / f"{name}.npz")
        if name == "routing":
            shipped = trace
    return shipped


def _continue(model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    text: str = tokenizer.decode(ids[0])
    return text


def card(
    model: OlmoeForCausalLM,
    progress: dict[str, Any],
    rows: list[tuple[str, int, float, float, float]],
    balance: dict[str, float],
    samples: dict[str, str],
) -> str:
    parameters = sum(p.numel() for p in model.parameters())
    table = "\n".join(
        f"| {kind} | {tokens:,} | {own:.1f} | {bigram:.0f} | {unigram:.0f} |"
        for kind, tokens, own, bigram, unigram in rows
    )
    peak, entropy, unused = balance.values()
    texts = "\n\n".join(f"**{kind}**\n\n```text\n{text}\n```" for kind, text in samples.items())
    return f"""# The demo model

OLMoE's geometry (16 MoE layers x 64 experts, top-8) at 128 wide: {parameters / 1e6:.1f} M
parameters, bfloat16, a byte-level BPE of {train.VOCABULARY} tokens. It exists so that expert
streaming can be shown and tested on real routing in seconds; it is far too small to be useful
as a language model. Generated by `python -m harness.demo.describe`.

Trained by `python -m harness.demo.train` (seed {progress["seed"]}, {progress["steps"]} steps of
{train.TOKENS_PER_STEP} tokens = {progress["steps"] * train.TOKENS_PER_STEP / 1e6:.1f} M tokens,
{progress["seconds"] / 3600:.2f} hours on 2 CPU cores) on six kinds of text from Debian 12
packages: the King James Bible (`bible-kjv-text`, public domain), the GNU Collaborative
International Dictionary of English (`dict-gcide`, GPL), French and German manual pages
(`manpages-fr`, `manpages-de`, mostly GPL), the kernel's documentation (`linux-doc-6.1`, GPL-2)
and the Python standard library (`libpython3.11-stdlib`, PSF). One document in
{corpus.HELD_OUT_ONE_IN} was held out.

## Perplexity on held-out documents

| kind | tokens | the model | bigram | unigram |
|---|---|---|---|---|
{table}

Windows of {WINDOW} tokens, each starting without context. The bigram and unigram models use the
same tokenizer and all training text of that one kind; the bigram's interpolation weight is the
best on the held-out text itself, which flatters it.

## Balance of the experts

On the shipped routing, mean over layers: the busiest expert gets {peak:.2f} times the mean load,
the load's entropy is {entropy:.3f} of the uniform one's, {unused:.1%} of the experts are never
used.

## Routing shipped beside it

`routing.npz`: {ROUTING["routing"][0]} held-out documents of each kind, {ROUTING["routing"][1]}
tokens each, with the router's weights of the chosen experts and with what each layer's router names
for the hidden state of the layer below (which prefetching guesses by). `routing-probabilities.npz`:
{ROUTING["routing-probabilities"][0]} of each kind, {ROUTING["routing-probabilities"][1]} tokens,
with the probabilities of all experts (float16).

## What it reads like

Greedy continuations of a few words, with the repetition penalty of {REPETITION_PENALTY} that
generation_config.json names. Phrases have the form of their kind of text, sentences make no sense,
and without the penalty it falls into loops.

{texts}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--corpus", type=Path, default=Path("corpus"))
    arguments = parser.parse_args()
    describe(arguments.out, arguments.corpus)


if __name__ == "__main__":
    main()
