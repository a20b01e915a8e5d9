"""DAOP (arXiv 2501.10375): placement that follows the sequence, experts calculated a layer ahead.

From the paper: the pinned tier (its GPU) holds an equal quota of each layer's popular experts. In
prefill, before a layer's experts run, the busiest in the mapped tier change places with the least
busy pinned ones, up to half of the layer's experts, where n_hot > 1.05 n_cold; the placement
stays. In decode the first five MoE layers use their router; from there on layer l+1's router is
applied to layer l's input, and the experts and weights that it names are the ones used. Mapped
ones are calculated ahead on the CPU, by two threads, from layer l's hidden state. Where none is
pinned, the weakest gives way to the best-scored pinned one. Both tiers compute at the same time.
The output is therefore not the model's own.

From the original's code: what a prompt needs and is still unpinned after the swaps is computed
where it is or copied first, whichever is faster (latencies.py); popularity is that of decoded
tokens; what is left over of the equal quota goes to the most popular experts of all layers.

Decided here: 'none is pinned, the weakest gives way' is the paper's rule for top-2, kept for any
top_k (the others stay, so it changes one expert); the newcomer gets its own probability, and the
weights are scaled back to their sum. The true router still runs, since transformers calls it; its
result is only used to measure the prediction. A copied expert is computed after the pinned ones,
beside the mapped ones.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from baselines import popularity
from baselines.base import Setting
from baselines.pinning import PinningSystem
from flashmoe.engines.transformers.experts.expert_arithmetic import expert_output
from flashmoe.engines.transformers.experts.lookahead import Lookahead, RouterOutput
from flashmoe.engines.transformers.experts.mixture import Mixture

TRUE_ROUTER_LAYERS = 5
SWAP_RATIO = 1.05
CPU_THREADS = 2


@dataclass
class _Plan:
    """What a layer will use: index and weights [1, top_k]; `ahead` is being calculated."""

    index: torch.Tensor
    weights: torch.Tensor
    ahead: dict[int, Future[torch.Tensor]] = field(default_factory=dict)


class DAOP(PinningSystem):
    """DAOP's orchestration over the same store."""

    name = "daop"
    pinned_what = "each layer's popular experts, swapped in prefill"
    decoded_only = True
    exact = False

    def choose(self, uses: np.ndarray, room: int) -> list[list[int]]:
        return popularity.most_popular_by_layer(uses, room)

    def prepare(self, setting: Setting) -> None:
        super().prepare(setting)
        self.lookahead: Lookahead = Lookahead(self.model)
        self.threads = ThreadPoolExecutor(CPU_THREADS)
        self.plan: _Plan | None = None
        self.swaps = self.copied = 0  # in prefill
        self.reset_counts()

    def reset_counts(self) -> None:
        self.requests = self.hits = self.predicted = self.predicted_right = self.degraded = 0

    def stats(self) -> dict[str, Any]:
        return {
            "requests": self.requests,
            "hits": self.hits,
            "swaps": self.swaps,
            "copied": self.copied,
            "degraded": self.degraded,
            "prediction_accuracy": self.predicted_right / max(1, self.predicted),
        }

    def run(
        self, layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        plan, self.plan = self.plan, None
        if len(hidden) > 1:
            self.swap(layer, index)
            plan = _Plan(index, weights)
        elif plan is None:
            plan = _Plan(index, weights)
        else:
            right = set(plan.index[0].tolist()) & set(index[0].tolist())
            self.predicted += index.shape[1]
            self.predicted_right += len(right)
        if len(hidden) == 1 and layer + 1 >= TRUE_ROUTER_LAYERS:
            self.plan = self.plan_ahead(layer + 1, hidden)
        return self.compute(layer, hidden, plan)

    def swap(self, layer: int, index: torch.Tensor) -> None:
        """Pin the prompt's busiest experts, in exchange for the least busy pinned ones."""
        n_experts = self.manifest.layers[layer].n_experts
        uses = torch.bincount(index.reshape(-1), minlength=n_experts).tolist()
        pinned = self.pinned.slot_of[layer]
        cold = sorted(pinned, key=lambda expert: uses[expert])
        hot = sorted((e for e in range(n_experts) if e not in pinned), key=lambda e: -uses[e])
        for new, old in list(zip(hot, cold, strict=False))[: n_experts // 2]:
            if uses[new] > SWAP_RATIO * uses[old]:
                self.pinned.replace(layer, old, new, self.mapped)
                self.swaps += 1

    def plan_ahead(self, layer: int, hidden: torch.Tensor) -> _Plan | None:
        """What `layer` will use, by the layer below's hidden state; the mapped part is begun."""
        guess = self.lookahead.route(layer, hidden)
        if guess is None:
            return None
        plan = self.degrade(layer, guess)
        for expert in plan.index[0].tolist():
            if not self.pinned.holds(layer, expert):
                plan.ahead[expert] = self.threads.submit(self.calculate, layer, expert, hidden)
        return plan

    def degrade(self, layer: int, guess: RouterOutput) -> _Plan:
        """If none of the guessed is pinned, the best-scored pinned one replaces the weakest."""
        index, weights = guess.experts.clone(), guess.weights.clone()
        pinned = list(self.pinned.slot_of[layer])
        if not pinned or any(self.pinned.holds(layer, expert) for expert in index[0].tolist()):
            return _Plan(index, weights)
        self.degraded += 1
        probabilities = guess.scores[0].float().softmax(-1)
        newcomer = pinned[int(probabilities[pinned].argmax())]
        weakest, total = int(weights[0].argmin()), weights.sum()
        index[0, weakest] = newcomer
        weights[0, weakest] = probabilities[newcomer].to(weights.dtype)
        return _Plan(index, weights * (total / weights.sum()))

    def calculate(self, layer: int, expert: int, hidden: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            parameters = self.mapped.parameters(layer, expert)
            return expert_output(self.modules[layer], parameters, hidden)

    def compute(self, layer: int, hidden: torch.Tensor, plan: _Plan) -> torch.Tensor:
        """Both tiers at the same time; experts that were calculated ahead are only added."""
        experts, tokens = plan.index.unique(return_counts=True)
        needed = dict(zip(experts.tolist(), tokens.tolist(), strict=True))
        pinned = [expert for expert in needed if self.pinned.holds(layer, expert)]
        self.requests += len(needed)
        self.hits += len(pinned)
        if plan.ahead:
            return self.add_up(layer, hidden, plan)
        unpinned = needed.keys() - set(pinned)
        copied = {e for e in unpinned if len(hidden) > 1 and self.latencies.copies(needed[e])}
        self.copied += len(copied)
        mixture = Mixture(self.modules[layer], hidden, plan.index, plan.weights)

        def add_mapped() -> None:
            with torch.inference_mode():
                for expert in sorted(unpinned - copied):
                    mixture.add(expert, self.mapped.parameters(layer, expert))

        beside = self.threads.submit(add_mapped) if unpinned - copied else None
        for expert in pinned:
            mixture.add(expert, self.pinned.parameters(layer, expert))
        for expert in sorted(copied):
            mixture.add(expert, self.copy(layer, expert))
        if beside:
            beside.result()
        return mixture.total()

    def add_up(self, layer: int, hidden: torch.Tensor, plan: _Plan) -> torch.Tensor:
        """hidden [1, width]: what was calculated ahead, and the pinned experts now."""
        total = torch.zeros_like(hidden)
        for expert, weight in zip(plan.index[0].tolist(), plan.weights[0], strict=True):
            if expert in plan.ahead:
                output = plan.ahead[expert].result()
            else:
                parameters = self.pinned.parameters(layer, expert)
                output = expert_output(self.modules[layer], parameters, hidden)
            total += (output * weight).to(hidden.dtype)
        return total

    def close(self) -> None:
        self.threads.shutdown()
        super().close()
