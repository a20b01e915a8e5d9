"""The engine of a transformers model: its experts modules compute from the cache's slots."""

from __future__ import annotations

from functools import partial

import torch
import transformers

from flashmoe.engines.base import Engine
from flashmoe.engines.transformers.arithmetic import EXACT, FAST, choices
from flashmoe.engines.transformers.experts import token_memory
from flashmoe.engines.transformers.experts.lookahead import Lookahead
from flashmoe.engines.transformers.experts.mixture import most_waiting_bytes
from flashmoe.engines.transformers.experts.streamed_experts import StreamedExperts
from flashmoe.engines.transformers.experts.token_memory import TokenMemory
from flashmoe.engines.transformers.model import moe_modules, streamed_module
from flashmoe.memory.device_arena import arena_on
from flashmoe.reading.backend import Backend
from flashmoe.reading.reader import ExtentReader


class TransformersEngine(Engine):
    """An `Engine` that computes in the place of a model's experts modules.

    modules: those, by name, in the order of layers. lookahead: what guesses are made by.
    """

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        backend: Backend,
        memory_bytes: int,
        policy: str,
        *,
        device: torch.device,
        prefetch: bool,
        check_reads: bool,
        arithmetic: str = EXACT,
    ) -> None:
        """Take over the experts modules of `model`, of which `backend` reads the experts.

        memory_bytes, policy, prefetch, check_reads and arithmetic are as for `flashmoe.load`;
        device is where the model computes. Raises FlashMoEError as `Engine` does.
        """
        super().__init__(
            ExtentReader(backend, check_all=check_reads),
            memory_bytes,
            policy,
            partial(arena_on, device),
            device=str(device),
            prefetch=prefetch,
        )
        self.beside_bytes = most_waiting_bytes(model)
        self.arithmetic = arithmetic
        if arithmetic == FAST and device.type == "cpu":
            self.kernels = {str(shape): str(found) for shape, found in choices(model).items()}
        self.modules = moe_modules.expert_modules(model)
        memory = None
        if self.residency.prefetcher.pays:
            vocabulary = getattr(model.config.get_text_config(), "vocab_size", 0)
            memory = TokenMemory(vocabulary, self.manifest.layers[0].n_experts, self.manifest.top_k)
        self.lookahead = Lookahead(model, memory)
        self._token_hook = memory and token_memory.watch(model, memory, self.residency)
        for number, module in enumerate(self.modules.values()):
            experts = StreamedExperts(
                number, self.residency, self.lookahead, fast=arithmetic == FAST
            )
            streamed_module.install(module, experts)

    @property
    def prefetch_layers(self) -> int:  # type: ignore[override]
        return 1 + sum(router is not None for router in self.lookahead.routers[1:])

    def go_on(self, *, in_child: bool) -> None:
        if in_child:
            # torch would wait for ever for OpenMP's threads, which only the parent has
            torch.set_num_threads(1)
        super().go_on(in_child=in_child)

    def close(self) -> None:
        with self.lock:
            if self._token_hook:
                self._token_hook.remove()
            for module in self.modules.values():
                streamed_module.uninstall(module)
            super().close()
