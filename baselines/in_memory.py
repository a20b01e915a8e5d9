"""No cap, everything resident, plain transformers: the ceiling."""

from __future__ import annotations

from transformers import AutoModelForCausalLM, PreTrainedModel

from baselines.base import Setting, System


class InMemory(System):
    """`from_pretrained` with transformers' eager experts, which FlashMoE's output must equal."""

    name = "in-memory"
    residency = "everything in DRAM"
    uses_budget = False

    def load(self, setting: Setting) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(
            setting.checkpoint, experts_implementation="eager"
        )
        return with_own_memory(model)


def with_own_memory(model: PreTrainedModel) -> PreTrainedModel:
    """`model`, its weights copied out of the files that transformers mapped.

    Then the pages are this process's own, and lie as torch aligns them: see `Shard.read`.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model
