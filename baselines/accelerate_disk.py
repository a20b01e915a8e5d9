"""Hugging Face accelerate's disk offload, as `device_map="auto"` sets it up."""

from __future__ import annotations

import tempfile

from transformers import AutoModelForCausalLM, PreTrainedModel

from baselines.base import Setting, System
from flashmoe.store import manifest as manifests


class AccelerateDisk(System):
    """Whole modules in DRAM while they fit; the others are loaded from disk at every use.

    An experts module comes as a whole: all experts of a layer for every token.
    """

    name = "accelerate-disk"
    residency = "modules in DRAM as far as the budget goes, the others on disk (accelerate)"

    def load(self, setting: Setting) -> PreTrainedModel:
        dense_bytes = manifests.load(setting.store).dense_bytes
        self.folder = tempfile.TemporaryDirectory(dir=setting.scratch or setting.store)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            setting.checkpoint,
            device_map="auto",
            max_memory={"cpu": setting.memory_bytes + dense_bytes},
            offload_folder=self.folder.name,
            experts_implementation="eager",
        )
        return model

    def close(self) -> None:
        self.folder.cleanup()
