"""Makes damaged checkpoints and holds the engine to transformers on each.

Whatever lies in a directory: the engine's output is that of `from_pretrained`, or it refuses in a
sentence. Each mutant is made by a seed, read in place and packed.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers

import flashmoe
from baselines.in_memory import with_own_memory
from flashmoe.engines.transformers.checkpoints.pack import pack
from flashmoe.errors import FlashMoEError
from harness import tiny_models
from harness.progress import Say
from harness.torture.mutations import MUTATIONS, Mutant

FAMILIES = ("olmoe", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3", "glm4v_moe",
            "granitemoe", "qwen3_vl_moe")  # fmt: skip
# `alike`: transformers' own forward fails, here as there. `more`: from_pretrained fails, or draws
# weights at random, and the engine goes on: to be looked at. The last two must not be.
OUTCOMES = ("equal", "refused", "alike", "more", "different", "traceback")
_IDS = torch.randint(3, 96, (1, 11), generator=torch.Generator().manual_seed(5))


@cache
def _model(family: str) -> transformers.PreTrainedModel:
    return tiny_models.make(family)


def make(folder: Path, seed: str) -> list[str]:
    """A mutant in `folder`, always the same by its seed; the names of what was done to it."""
    dice = random.Random(seed)
    model = _model(dice.choice(FAMILIES))
    model.save_pretrained(folder, max_shard_size=dice.choice(["100KB", "100KB", "1GB"]))
    mutant, done = Mutant(folder, dice), [model.config.model_type]
    for mutation in dice.choices(MUTATIONS, k=dice.choice([1, 1, 1, 2, 3])):
        try:
            mutation(mutant)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError):
            continue  # what a mutation before it has left is not what it changes
        except Exception as error:  # safetensors' own, for a file that was cut
            if type(error).__name__ != "SafetensorError":
                raise
            continue
        done.append(mutation.__name__)
    return done


def judge(folder: Path) -> tuple[str, str]:
    """The worse of the outcomes in place and packed, and what was said."""
    expected = _plain(folder)
    outcomes = []
    for packed in (False, True):
        try:
            output = _streamed(folder, packed)
        except FlashMoEError as error:
            outcomes.append(("refused", str(error)))
        except Exception as error:
            alike = type(expected) is type(error)
            outcomes.append(("alike" if alike else "traceback", repr(error)))
        else:
            if isinstance(expected, Exception):
                outcomes.append(("more", repr(expected)))
            else:
                same = expected.dtype == output.dtype
                same = same and torch.equal(expected.nan_to_num(), output.nan_to_num())
                outcomes.append(("equal" if same else "different", ""))
    return max(outcomes, key=lambda outcome: OUTCOMES.index(outcome[0]))


def _plain(folder: Path) -> torch.Tensor | Exception:
    """What transformers gives, or why it does not."""
    try:
        names = json.loads((folder / "config.json").read_text()).get("architectures")
        named = getattr(transformers, names[0], None) if isinstance(names, list) and names else None
        model, info = (named or transformers.AutoModelForCausalLM).from_pretrained(
            folder, experts_implementation="eager", output_loading_info=True
        )
        parameters = dict(model.named_parameters())
        if drawn := [name for name in info["missing_keys"] if name in parameters]:
            return LookupError(f"transformers draws {drawn[0]} at random")
        with torch.inference_mode():
            return tiny_models.output(with_own_memory(model.eval())(_IDS))
    except Exception as error:
        return error


def _streamed(folder: Path, packed: bool) -> torch.Tensor:
    with TemporaryDirectory() as work, torch.inference_mode():
        path = folder
        if packed:
            path = Path(work) / "store"
            pack(folder, path)
        model = flashmoe.load(path, memory="64MiB", policy="lru")
        try:
            return tiny_models.output(model(_IDS))
        finally:
            model.flashmoe.close()


def examine(count: int, seed: int = 0, say: Say = lambda text: None) -> list[dict[str, Any]]:
    """A row a mutation: how many mutants had it, and what became of them."""
    tally: dict[str, Counter[str]] = {m.__name__: Counter() for m in MUTATIONS}
    for number in range(count):
        with TemporaryDirectory() as work:
            folder = Path(work) / "mutant"
            done = make(folder, f"{seed}/{number}")
            outcome, why = judge(folder)
        for mutation in set(done[1:]):
            tally[mutation][outcome] += 1
        if outcome in OUTCOMES[3:]:
            say(f"mutant {seed}/{number} ({', '.join(done)}): {outcome} {why[:300]}")
    return [
        {"mutation": name, "mutants": sum(counts.values())} | {o: counts[o] for o in OUTCOMES}
        for name, counts in tally.items()
    ]
