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
        # transformers maps the file; a copy makes the pages this process's own
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        return model
