"""What a long prompt takes beside the budget: the kernel's count of a process of its own."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers

import flashmoe
from baselines.in_memory import with_own_memory
from flashmoe.engines.transformers.model import empty_model, moe_modules
from flashmoe.util import workers
from harness.progress import say

TOKENS = (1024, 8192, 32768)
# OLMoE's layer at its full size, twice.
CONFIG = dict(
    hidden_size=2048, intermediate_size=1024, num_experts=64, num_experts_per_tok=8,
    num_hidden_layers=2, num_attention_heads=16, vocab_size=512, max_position_embeddings=32768,
    dtype="bfloat16",
)  # fmt: skip
SLOT_SHARE = 0.5  # of a layer's experts
SYSTEMS = ("flashmoe", "transformers")
_FILLING_TOKENS = 256  # of a first prompt, after which all slots are taken


def table(config: dict[str, Any] | None = None, tokens: tuple[int, ...] = TOKENS) -> list[Any]:
    """A row for each length and system, on a model with random weights."""
    rows = []
    with TemporaryDirectory(prefix="flashmoe-") as folder:
        torch.manual_seed(0)
        olmoe = transformers.OlmoeConfig(**CONFIG | (config or {}))
        model = transformers.OlmoeForCausalLM._from_config(olmoe, dtype=torch.bfloat16)
        # or attention's mean over the prompt outweighs each token, and all choose the same experts
        torch.nn.init.normal_(model.get_input_embeddings().weight)
        model.save_pretrained(folder)
        del model
        for length in tokens:
            for system in SYSTEMS:
                say(f"{length} tokens by {system}")
                # a new interpreter: what another run took and gave back counts for no peak
                with ProcessPoolExecutor(1, get_context("spawn"), workers.end_with_parent) as pool:
                    rows.append(pool.submit(_measure, Path(folder), system, length).result())
    return rows


@torch.inference_mode()
def _measure(checkpoint: Path, system: str, tokens: int) -> dict[str, Any]:
    """Peaks of one prompt over what the process held before it, in bytes."""
    model = _load(checkpoint, system)
    generator = torch.Generator().manual_seed(1)
    limit = model.config.vocab_size
    model(torch.randint(3, limit, (1, _FILLING_TOKENS), generator=generator), logits_to_keep=1)
    ids = torch.randint(3, limit, (1, tokens), generator=generator)
    peaks = _Peaks(model)
    model(ids, logits_to_keep=1)
    return {
        "tokens": tokens,
        "system": system,
        "peak_beside_bytes": peaks.whole(),
        "experts_beside_bytes": peaks.experts,
        "hidden_bytes": tokens * model.config.hidden_size * 2,
        "busiest_expert_tokens": peaks.busiest,
    }


def _load(checkpoint: Path, system: str) -> transformers.PreTrainedModel:
    if system == "flashmoe":
        config = empty_model.read_config(checkpoint)
        layer_bytes = 3 * config.hidden_size * config.intermediate_size * 2 * config.num_experts
        memory = int(SLOT_SHARE * config.num_hidden_layers * layer_bytes)
        return flashmoe.load(checkpoint, memory=memory, policy="lru")
    return with_own_memory(
        transformers.OlmoeForCausalLM.from_pretrained(
            checkpoint, experts_implementation="eager", dtype=torch.bfloat16
        )
    )


class _Peaks:
    """The most that this process held from now on, and that its experts modules took of it.

    busiest: the most tokens that chose one expert.
    """

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        self.experts = self.busiest = 0
        self._restart()
        self._before = self._most = _resident("VmRSS")
        for module in moe_modules.expert_modules(model).values():
            module.register_forward_pre_hook(self._enter)
            module.register_forward_hook(self._leave)

    def whole(self) -> int:
        """Over what it held at first."""
        return max(self._most, _resident("VmHWM")) - self._before

    def _enter(self, _: object, inputs: tuple[torch.Tensor, ...]) -> None:
        self.busiest = max(self.busiest, int(inputs[1].flatten().bincount().max()))
        self._most = max(self._most, _resident("VmHWM"))
        self._restart()
        self._entered = _resident("VmRSS")

    def _leave(self, *_: object) -> None:
        self.experts = max(self.experts, _resident("VmHWM") - self._entered)

    def _restart(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is held


def _resident(field: str) -> int:
    """Bytes: VmRSS now, VmHWM at most since the last restart."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
