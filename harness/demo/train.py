"""Train the demo model: `python -m harness.demo.train OUT` (resumes from OUT/checkpoint.pt).

Constant learning rate after a warm-up, linear decay over the last part of --steps: a run that
turns out slower or faster than planned is resumed with another --steps and loses nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from harness.demo import corpus, grouped_experts
from harness.demo.muon import Muon

VOCABULARY = 4096
END_OF_TEXT = "<|endoftext|>"
TOKENS_PER_STEP = 2048  # 4,096 learnt less from the same tokens: 6.80 against 6.50 at 200,000
SEQUENCE_LENGTHS = ((0.0, 128), (0.5, 256), (0.85, 512))  # from this share of the steps on
WARM_UP_STEPS = 100
DECAY_SHARE = 0.35
CHECKPOINT_STEPS = 50
BALANCE_LOSS = 0.01  # OLMoE's own coefficient, here applied per layer
MATRIX_LEARNING_RATE = 5.0  # Muon's, as a multiple of AdamW's
# Huge pages, and no memory handed back between steps: page faults would take half of the time.
_MALLOC = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:"
    "glibc.malloc.trim_threshold=34359738368:glibc.malloc.top_pad=268435456"
)


def train_tokenizer(documents: dict[str, list[str]]) -> PreTrainedTokenizerFast:
    """Byte-level BPE on equal shares of each kind, so that none owns the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    budget = 3_000_000  # characters of each kind
    texts = []
    for kind in documents.values():
        taken = 0
        for text in kind:
            if taken < budget:
                texts.append(text)
                taken += len(text)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """All documents of a kind as one uint16 stream, each closed by the end-of-text token."""
    batch = tokenizer.backend_tokenizer.encode_batch(texts)
    end = tokenizer.eos_token_id
    return np.concatenate([np.array([*e.ids, end], dtype=np.uint16) for e in batch])


def demo_config(end: int, **overrides: Any) -> OlmoeConfig:
    """OLMoE's geometry (16 layers x 64 experts, top-8) at 128 wide: 27 M parameters.

    Unlike OLMoE the weights of the chosen experts add up to 1 (as Qwen3-MoE's do) and the
    initial spread suits 128 wide: else every expert's output starts near zero and learns late.
    """
    sizes = dict(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=64,
        num_experts_per_tok=8,
        max_position_embeddings=2048,
        initializer_range=0.06,
        norm_topk_prob=True,
    )
    ids = dict(eos_token_id=end, pad_token_id=end, bos_token_id=None)
    return OlmoeConfig(**(sizes | overrides | ids))  # type: ignore[arg-type]


def balance_loss(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Switch Transformer's load-balancing loss, mean over layers (1.0 when balanced).

    transformers' own pools the layers, which lets one layer's bias cancel another's.
    """
    losses = []
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)
        top_experts = probabilities.topk(top_k, -1).indices
        experts = logits.shape[-1]
        load = torch.bincount(top_experts.reshape(-1), minlength=experts) / top_experts.numel()
        losses.append(experts * (load * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


class Batches:
    """Random windows, the same number of tokens of every kind in each step."""

    def __init__(self, streams: list[np.ndarray], seed: int) -> None:
        self.streams = streams
        self.seed = seed

    def at(self, step: int, length: int) -> torch.Tensor:
        rng = np.random.default_rng((self.seed, step))
        rows = []
        for row in range(TOKENS_PER_STEP // length):
            stream = self.streams[(row + step * 5) % len(self.streams)]
            start = rng.integers(0, len(stream) - length)
            rows.append(stream[start : start + length].astype(np.int64))
        return torch.from_numpy(np.stack(rows))


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate."""
    decay_steps = steps * DECAY_SHARE
    return min((step + 1) / WARM_UP_STEPS, 1.0, max((steps - step) / decay_steps, 0.02))


def make_optimisers(model: OlmoeForCausalLM, peak: float) -> list[torch.optim.Optimizer]:
    """Muon for the attention's and the experts' matrices, AdamW for all else."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() == 3 or (parameter.dim() == 2 and "self_attn" in name)
        (matrices if is_matrix else others).append(parameter)
    optimisers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=peak * MATRIX_LEARNING_RATE),
        torch.optim.AdamW(others, lr=peak, betas=(0.9, 0.95), weight_decay=0.05, fused=True),
    ]
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]
    return optimisers


def train(
    out: Path, cache: Path, steps: int, peak: float, seed: int, sizes: Mapping[str, int]
) -> None:
    """Train to `steps`, from OUT's checkpoint if there is one; `sizes` override demo_config's."""
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    print("reading the corpus", flush=True)
    documents = corpus.load(cache, held_out=False)
    tokenizer_path = out / "model"
    if (tokenizer_path / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_path)
    else:
        tokenizer = train_tokenizer(documents)
        tokenizer.save_pretrained(tokenizer_path)
    streams = {kind: encode(tokenizer, texts) for kind, texts in documents.items()}
    print({kind: f"{len(s) / 1e6:.1f} M tokens" for kind, s in streams.items()}, flush=True)

    model = OlmoeForCausalLM(demo_config(tokenizer.eos_token_id, **sizes))
    model.set_experts_implementation(grouped_experts.NAME)
    optimisers = make_optimisers(model, peak)
    checkpoint = out / "checkpoint.pt"
    first, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimiser, its_state in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(its_state)
        first, seconds = state["step"], state["seconds"]
    batches = Batches(list(streams.values()), seed)
    top_k = model.config.num_experts_per_tok
    mean_loss, started = math.nan, time.monotonic()
    for step in range(first, steps):
        length = [n for share, n in SEQUENCE_LENGTHS if step >= share * steps][-1]
        ids = batches.at(step, length)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * schedule(step, steps)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(input_ids=ids, use_cache=False, output_router_logits=True)
            loss = torch.nn.functional.cross_entropy(
                output.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()
            )
            balance = balance_loss(output.router_logits, top_k)
        (loss + BALANCE_LOSS * balance).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if norm.isfinite():  # once in 1,200 steps it was not, and the run was lost
            for optimiser in optimisers:
                optimiser.step()
        else:
            print(f"step {step} skipped: the gradient is not finite", flush=True)
        model.zero_grad()
        if loss.isfinite():
            old = loss.item() if math.isnan(mean_loss) else mean_loss
            mean_loss = 0.98 * old + 0.02 * loss.item()
        if step % 20 == 0 or step + 1 == steps:
            elapsed = time.monotonic() - started
            rate = (step + 1 - first) * TOKENS_PER_STEP / elapsed
            print(
                f"step {step} loss {mean_loss:.3f} balance {balance.item():.3f} "
                f"{rate:.0f} tokens/s {seconds + elapsed:.0f} s",
                flush=True,
            )
        if (step + 1) % CHECKPOINT_STEPS == 0 or step + 1 == steps:
            state = {
                "model": model.state_dict(),
                "optimisers": [optimiser.state_dict() for optimiser in optimisers],
                "step": step + 1,
                "seconds": seconds + time.monotonic() - started,
            }
            torch.save(state, checkpoint.with_suffix(".partial"))
            checkpoint.with_suffix(".partial").replace(checkpoint)
    model.set_experts_implementation("eager")
    model.to(torch.bfloat16).save_pretrained(out / "model")
    progress = {"steps": steps, "seconds": state["seconds"], "seed": seed, "loss": mean_loss}
    (out / "progress.json").write_text(json.dumps(progress) + "\n")


def restart_with_huge_pages(module: str) -> None:
    """Run `python -m module` anew under _MALLOC, which is read at a process's start only."""
    if "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = _MALLOC
        os.execv(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--corpus", type=Path, default=Path("corpus"), help="download cache")
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=20261124)
    arguments = parser.parse_args()
    restart_with_huge_pages("harness.demo.train")
    train(
        arguments.out,
        arguments.corpus,
        arguments.steps,
        arguments.learning_rate,
        arguments.seed,
        sizes={},
    )


if __name__ == "__main__":
    main()
