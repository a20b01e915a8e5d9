"""The policy of the FlashMoE paper, as far as it is public."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

from flashmoe.errors import FlashMoEError
from flashmoe.events import Event
from flashmoe.policies.base import Policy, Scope
from flashmoe.policies.parts import policy_file
from flashmoe.util.machine_code import helper

SHIPPED = Path(__file__).with_suffix(".safetensors")
SHIPPED_VECTOR = SHIPPED.with_name("flashmoe_paper_vector.safetensors")
KIND = "paper"
HIDDEN = 128  # units of both hidden layers
NO_SLOT, WAITS = -1, -2  # in `slot`, instead of a slot's number
SLOTS_TAKEN, N_WAITING = 0, 1  # positions in `counts`


class FlashMoEPaper(Policy):
    """Evicts by one network per layer that sees 1/recency and frequency and imitates Belady.

    From arXiv 2601.17063, of which we had notes and not the text. Recency is 1 on access and
    grows by one each step; frequency is uses divided by those of the layer's most used expert.
    We decided what the notes leave open: statistics restart with a cold cache, a step is an
    event of the layer, and of equal scores the longest resident is evicted.
    `flashmoe-paper:FILE` runs networks of either shape, the scorer 2-128-128-1 or the vector
    2C-128-128-C over C slots. The shipped scorers, and the vectors of `flashmoe-paper:vector`,
    were trained on the demo model at half of its experts; a model with more layers reuses them
    in turn.
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
        self.most_uses = np.ones(scope.n_layers, np.int64)  # of any expert, by layer
        self.steps = np.zeros(scope.n_layers, np.int64)  # events of each layer
        self.slot = np.full(self.n_keys, NO_SLOT)  # which input of the vector an expert has
        self.waiting = np.full(self.n_keys, -1)  # experts that get the slots of the next victims
        self.counts = np.zeros(2, np.int64)  # by SLOTS_TAKEN, N_WAITING
        self.scores = np.zeros(self.n_keys, np.float32)
        self.scored_at = np.full(self.n_keys, -1)  # the step of its layer at which it was scored
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
        victim, highest = candidates[0], np.float32(-np.inf)
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
                    victim, highest = key, self.y[self.slot[key]]
        else:
            for key in candidates:
                score(self, key)
                if self.scores[key] > highest:
                    victim, highest = key, self.scores[key]
        leave(self, victim)
        return victim


@helper
def observe(self, event):
    """Update recency, frequency and slots by `event`."""
    layer = event.keys[0] // self.n_experts
    self.steps[layer] += 1
    for key, count in zip(event.keys, event.counts):
        self.uses[key] += count
        self.most_uses[layer] = max(self.most_uses[layer], self.uses[key])
        self.last_use[key] = self.steps[layer]
        if self.slot[key] == NO_SLOT:
            if self.counts[SLOTS_TAKEN] < self.n_slots:
                self.slot[key] = self.counts[SLOTS_TAKEN]
                self.counts[SLOTS_TAKEN] += 1
            else:
                self.slot[key] = WAITS
                self.waiting[self.counts[N_WAITING]] = key
                self.counts[N_WAITING] += 1


@helper
def leave(self, key):
    """Evict `key`: the expert that has waited longest gets its slot."""
    if self.counts[N_WAITING] and self.slot[key] >= 0:
        self.slot[self.waiting[0]] = self.slot[key]
        self.counts[N_WAITING] -= 1
        for i in range(self.counts[N_WAITING]):
            self.waiting[i] = self.waiting[i + 1]
    self.slot[key] = NO_SLOT


@helper
def score(self, key):
    """Set self.scores[key], at most once per event of its layer."""
    layer = key // self.n_experts
    if self.scored_at[key] != self.steps[layer]:
        self.x[0], self.x[1] = inputs_of(self, key)
        run(self, (self.first_layer + layer) % self.n_networks)
        self.scores[key] = self.y[0]
        self.scored_at[key] = self.steps[layer]


@helper
def inputs_of(self, key):
    """1 / recency and uses / most uses."""
    layer = key // self.n_experts
    recency = self.steps[layer] - self.last_use[key] + 1
    return np.float32(1 / recency), np.float32(self.uses[key] / self.most_uses[layer])


@helper
def run(self, network):
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
    """The networks of a policy file, stacked by layer. Raises FlashMoEError when it is none."""
    tensors, _ = policy_file.read(path, KIND)
    layers, inputs = tensors["w1"].shape[:2] if tensors.get("w1", np.empty(0)).ndim == 3 else (1, 2)
    return policy_file.read_tensors(path, KIND, shapes(layers, inputs))


def shapes(layers: int, inputs: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the networks' tensors; `inputs` is 2 for scorers, 2C for vectors over C slots."""
    return {
        "w1": (layers, inputs, HIDDEN), "b1": (layers, HIDDEN),
        "w2": (layers, HIDDEN, HIDDEN), "b2": (layers, HIDDEN),
        "w3": (layers, HIDDEN, inputs // 2), "b3": (layers, inputs // 2),
    }  # fmt: skip
