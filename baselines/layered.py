"""What the DRAM baselines share: transformers' model, with a layer's experts run their way."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import nn
from transformers import PreTrainedModel

from baselines.base import Setting, System
from flashmoe.engines.transformers.checkpoints.backends.packed import PackedModel
from flashmoe.engines.transformers.model import dense_weights, moe_modules, streamed_module
from flashmoe.store.manifest import Manifest


class LayeredSystem(System):
    """Loads everything but the experts (pinned), then answers for each layer's experts."""

    def load(self, setting: Setting) -> PreTrainedModel:
        backend = PackedModel(setting.store)
        self.manifest: Manifest = backend.manifest
        self.model = backend.build()
        self.modules = list(moe_modules.expert_modules(self.model).values())
        dense_weights.fill(self.model, backend.dense(), backend.path, backend.remedy)
        backend.close()
        self.prepare(setting)
        for number, module in enumerate(self.modules):
            streamed_module.install(module, _Layer(self, number))
        return self.model

    @abstractmethod
    def prepare(self, setting: Setting) -> None:
        """Bring experts to where they start from; the model is there but for them."""

    @abstractmethod
    def run(
        self, layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden [tokens, width], index and weights [tokens, top_k] -> [tokens, width]."""


class _Layer:
    def __init__(self, system: LayeredSystem, number: int) -> None:
        self.system = system
        self.number = number

    def forward(
        self, module: nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        return self.system.run(self.number, hidden, index, weights)
