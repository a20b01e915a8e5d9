"""The policy of the FlashMoE paper, as far as it can be known."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

from flashmoe.errors import FlashMoEError
from flashmoe.events import Event
from flashmoe.policies.base import Policy, Scope
from flashmoe.policies.parts import policy_file
from flashmoe.policies.parts.compiled import helper

SHIPPED = Path(__file__).with_suffix(".safetensors")
SHIPPED_VECTOR = SHIPPED.with_name("flashmoe_paper_vector.safetensors")
KIND = "paper"
HIDDEN = 128


class FlashMoEPaper(Policy):
    """Evicts by a network a layer that sees 1/recency and frequency and imitates Belady.

    arXiv 2601.17063 from notes (spec section 3). Recency is 1 on access and grows by one a
    step; frequency is uses over the layer's most-used expert's. Open points decided here:
    statistics restart with a cold cache; a step is an event of the layer; equal scores go to
    the longest resident. `flashmoe-paper:FILE` runs networks of either shape, the scorer
    2-128-128-1 or the vector 2C-128-128-C over C slots. Those that ship were trained on the
    demo model at 32 of 64 slots, the vectors are `flashmoe-paper:vector`; another model's
    layer l runs number l modulo 16.
    """

    name = "flashmoe-paper"
    parameter = "vector, or a file from `flashmoe train-policy --kind paper`"

    def __init__(
        self, scope: Scope, n_slots: int, networks: dict[str, np.ndarray] | None = None
    ) -> None:
        super().__init__(scope, n_slots)
        networks = networks or load(SHIPPED)
        layers, inputs, _ = networks["w1"].shape
        if inputs != 2 and inputs != 2 * n_slots:
            raise FlashMoEError(
                f"policy flashmoe-paper: these networks are for {inputs // 2} slots, not "
                f"{n_slots}; train others with `flashmoe train-policy --kind paper`"
            )
        self.n_experts = scope.n_experts
        self.last_use = np.full(self.n_keys, -1)
        self.uses = np.zeros(self.n_keys, np.int64)
        self.most = np.ones(scope.n_layers, np.int64)
        self.steps = np.zeros(scope.n_layers, np.int64)
        self.slot = np.full(self.n_keys, -1)  # for the vector: the input that an expert has
        self.waiting = np.full(self.n_keys, -1)  # experts whose slot the next victim leaves
        self.filled = np.zeros(2, np.int64)  # slots given out; experts waiting
        self.scores = np.zeros(self.n_keys, np.float32)
        self.scored_at = np.full(self.n_keys, -1)  # the step of its layer that a score is from
        self.n_networks = layers
        self.first_layer = scope.first_layer
        self.w1, self.b1, self.w2 = networks["w1"], networks["b1"], networks["w2"]
        self.b2, self.w3, self.b3 = networks["b2"], networks["w3"], networks["b3"]
        self.x = np.zeros(inputs, np.float32)
        self.h1, self.h2 = np.zeros(HIDDEN, np.float32), np.zeros(HIDDEN, np.float32)
        self.y = np.zeros(self.b3.shape[1], np.float32)

    @classmethod
    def options(cls, argument: str) -> dict[str, object]:
        return {"networks": load(SHIPPED_VECTOR if argument == "vector" else Path(argument))}

    def touch(self, event: Event, now: int) -> None:
        observe(self, event)

    def victim(self, candidates: np.ndarray) -> int:
        layer = candidates[0] // self.n_experts
        network = (self.first_layer + layer) % self.n_networks
        best, highest = candidates[0], np.float32(-np.inf)
        if len(self.x) > 2:
            for i in range(len(self.x)):
                self.x[i] = 0
            for key in candidates:
                slot = self.slot[key]
                if slot >= 0:
                    self.x[2 * slot], self.x[2 * slot + 1] = inputs_of(self, key)
            run(self, network)
            for key in candidates:
                if self.slot[key] >= 0 and self.y[self.slot[key]] > highest:
                    best, highest = key, self.y[self.slot[key]]
        else:
            for key in candidates:
                score(self, key)
                if self.scores[key] > highest:
                    best, highest = key, self.scores[key]
        leave(self, best)
        return best


@helper
def observe(self, event):  # type: ignore[no-untyped-def]
    """Recency, frequency and slots after `event`."""
    layer = event.keys[0] // self.n_experts
    self.steps[layer] += 1
    for key, count in zip(event.keys, event.counts):
        self.uses[key] += count
        self.most[layer] = max(self.most[layer], self.uses[key])
        self.last_use[key] = self.steps[layer]
        if self.slot[key] == -1:
            if self.filled[0] < self.n_slots:
                self.slot[key] = self.filled[0]
                self.filled[0] += 1
            else:
                self.slot[key] = -2  # waits for the slot of a victim
                self.waiting[self.filled[1]] = key
                self.filled[1] += 1


@helper
def leave(self, key):  # type: ignore[no-untyped-def]
    """Give the victim's slot to the expert that has waited longest."""
    if self.filled[1] and self.slot[key] >= 0:
        self.slot[self.waiting[0]] = self.slot[key]
        self.filled[1] -= 1
        for i in range(self.filled[1]):
            self.waiting[i] = self.waiting[i + 1]
    self.slot[key] = -1


@helper
def score(self, key):  # type: ignore[no-untyped-def]
    """self.scores[key]: once an event of its layer, however many victims that takes."""
    layer = key // self.n_experts
    if self.scored_at[key] != self.steps[layer]:
        self.x[0], self.x[1] = inputs_of(self, key)
        run(self, (self.first_layer + layer) % self.n_networks)
        self.scores[key] = self.y[0]
        self.scored_at[key] = self.steps[layer]


@helper
def inputs_of(self, key):  # type: ignore[no-untyped-def]
    """1 / recency and uses / most uses."""
    layer = key // self.n_experts
    recency = self.steps[layer] - self.last_use[key] + 1
    return np.float32(1 / recency), np.float32(self.uses[key] / self.most[layer])


@helper
def run(self, network):  # type: ignore[no-untyped-def]
    """self.y = one layer's network on self.x."""
    for j in range(HIDDEN):
        self.h1[j] = self.b1[network, j]
        self.h2[j] = self.b2[network, j]
    for i in range(len(self.x)):
        for j in range(HIDDEN):
            self.h1[j] += self.x[i] * self.w1[network, i, j]
    for i in range(HIDDEN):
        silu = self.h1[i] / (1 + np.exp(-self.h1[i]))
        for j in range(HIDDEN):
            self.h2[j] += silu * self.w2[network, i, j]
    for j in range(len(self.y)):
        self.y[j] = self.b3[network, j]
    for i in range(HIDDEN):
        silu = self.h2[i] / (1 + np.exp(-self.h2[i]))
        for j in range(len(self.y)):
            self.y[j] += silu * self.w3[network, i, j]


@cache
def load(path: Path) -> dict[str, np.ndarray]:
    """Networks of a policy file, a layer first. Raises FlashMoEError when it is none."""
    tensors, _ = policy_file.read(path, KIND)
    layers, inputs = tensors["w1"].shape[:2] if tensors.get("w1", np.empty(0)).ndim == 3 else (1, 2)
    return policy_file.load(path, KIND, shapes(layers, inputs))


def shapes(layers: int, inputs: int) -> dict[str, tuple[int, ...]]:
    """Of the networks' tensors; `inputs` is 2 for scorers, 2C for vectors over C slots."""
    return {
        "w1": (layers, inputs, HIDDEN), "b1": (layers, HIDDEN),
        "w2": (layers, HIDDEN, HIDDEN), "b2": (layers, HIDDEN),
        "w3": (layers, HIDDEN, inputs // 2), "b3": (layers, inputs // 2),
    }  # fmt: skip
