"""The policy of the FlashMoE paper, as far as it is public."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flashmoe.errors import FlashMoEError
from flashmoe.events import Event
from flashmoe.policies.base import Policy, Scope
from flashmoe.policies.parts import policy_file
from flashmoe.util.machine_code import helper

KIND = "paper"
NO_SLOT, WAITS = -1, -2  # in `slot`, instead of a slot's number
N_FREE, N_WAITING = 0, 1  # positions in `counts`
SCORER, VECTOR, EXPERTS = range(3)  # positions in READINGS
READINGS = ("scorer", "vector", "experts")  # what the networks may see, as the class says
SHIPPED = {
    reading: Path(__file__).with_name(f"flashmoe_paper_{reading}.safetensors")
    for reading in READINGS
}


class Networks(NamedTuple):
    """Networks of one reading, a set of layers for each number of slots.

    A set is w1 [layers, inputs, hidden], b1 [layers, hidden], w2 [layers, hidden, hidden], b2,
    w3 [layers, hidden, outputs], b3 [layers, outputs]; float32.
    """

    reading: str
    by_slots: dict[int, dict[str, np.ndarray]]

    def nearest(self, n_slots: int) -> dict[str, np.ndarray]:
        """Those for the number of slots nearest to `n_slots`."""
        return self.by_slots[min(self.by_slots, key=lambda slots: abs(slots - n_slots))]


class FlashMoEPaper(Policy):
    """Evicts by one network per layer that sees 1/recency and frequency and imitates Belady.

    From arXiv 2601.17063, of which we had notes and not the text; they allow three readings. The
    `scorer` 2-128-128-1 rates each candidate; the `vector` 2C-128-128-C sees all C slots at once;
    `experts` 2E-64-64-E sees all E experts, resident or not, and tells how far their next uses
    are (as ML_FlashMoE of GitHub malmong/CECAR). Recency is 1 on access and grows by one each
    step; frequency is uses divided by those of the layer's most used expert. We decided what the
    notes leave open: statistics restart with a cold cache, a step is an event of the layer, and
    of equal scores the longest resident is evicted.

    `flashmoe-paper:READING` runs the networks that ship, trained on the demo model for 16 and 32
    of 64 slots, `flashmoe-paper:FILE` others. A policy takes the networks for the number of slots
    nearest to its own; vectors must be for just as many. A model with more layers reuses them in
    turn.
    """

    name = "flashmoe-paper"
    parameter = "scorer (the default), vector, experts, or a file from `flashmoe train-policy`"

    def __init__(self, scope: Scope, n_slots: int, networks: Networks | None = None) -> None:
        super().__init__(scope, n_slots)
        networks = networks or load(SHIPPED["scorer"])
        network = networks.nearest(n_slots)
        layers, inputs, hidden = network["w1"].shape
        self.reading = READINGS.index(networks.reading)
        if self.reading == VECTOR and inputs != 2 * n_slots:
            raise FlashMoEError(
                f"policy flashmoe-paper: these networks are for {inputs // 2} slots, not "
                f"{n_slots}; train others with `flashmoe train-policy --kind paper-vector`"
            )
        if self.reading == EXPERTS and inputs != 2 * scope.n_experts:
            raise FlashMoEError(
                f"policy flashmoe-paper: these networks are for {inputs // 2} experts, not "
                f"{scope.n_experts}; train others with `flashmoe train-policy --kind paper-experts`"
            )
        self.n_experts = scope.n_experts
        self.last_use = np.full(self.n_keys, -1)
        self.uses = np.zeros(self.n_keys, np.int64)
        self.most_uses = np.ones(scope.n_layers, np.int64)  # of any expert, by layer
        self.steps = np.zeros(scope.n_layers, np.int64)  # events of each layer
        self.slot = np.full(self.n_keys, NO_SLOT)  # which input of the vector an expert has
        self.free = np.arange(n_slots)[::-1].copy()  # a stack of slots that no expert has
        self.waiting = np.full(self.n_keys, -1)  # experts that get the slots of the next victims
        self.counts = np.array([n_slots, 0])  # by N_FREE, N_WAITING
        self.scores = np.zeros(self.n_keys, np.float32)
        self.scored_at = np.full(self.n_keys, -1)  # the step of its layer at which it was scored
        self.n_networks = layers
        self.first_layer = scope.first_layer
        self.w1, self.b1, self.w2 = network["w1"], network["b1"], network["w2"]
        self.b2, self.w3, self.b3 = network["b2"], network["w3"], network["b3"]
        self.x = np.zeros(inputs, np.float32)
        self.h1, self.h2 = np.zeros(hidden, np.float32), np.zeros(hidden, np.float32)
        self.y = np.zeros(self.b3.shape[1], np.float32)

    @classmethod
    def options(cls, argument: str) -> dict[str, object]:
        return {"networks": load(SHIPPED.get(argument, Path(argument)))}

    def touch(self, event: Event, now: int) -> None:
        observe(self, event)

    def victim(self, candidates: np.ndarray) -> int:
        if self.reading == VECTOR:
            score_slots(self, candidates)
        victim, highest = candidates[0], np.float32(-np.inf)
        for key in candidates:
            if self.reading == SCORER:
                score(self, key)
            elif self.reading == EXPERTS:
                score_layer(self, key // self.n_experts)
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
            if self.counts[N_FREE]:
                self.counts[N_FREE] -= 1
                self.slot[key] = self.free[self.counts[N_FREE]]
            else:
                self.slot[key] = WAITS
                self.waiting[self.counts[N_WAITING]] = key
                self.counts[N_WAITING] += 1


@helper
def leave(self, key):
    """Evict `key`: the expert that has waited longest gets its slot."""
    slot, n_waiting = self.slot[key], self.counts[N_WAITING]
    self.slot[key] = NO_SLOT
    if slot == WAITS or (slot >= 0 and n_waiting):
        position = 0
        while slot == WAITS and self.waiting[position] != key:
            position += 1
        if slot >= 0:
            self.slot[self.waiting[0]] = slot
        self.counts[N_WAITING] -= 1
        for i in range(position, n_waiting - 1):
            self.waiting[i] = self.waiting[i + 1]
    elif slot >= 0:
        self.free[self.counts[N_FREE]] = slot
        self.counts[N_FREE] += 1


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
def score_slots(self, candidates):
    """Set the scores of all candidates by one network that sees them; of no slot, the lowest."""
    layer = candidates[0] // self.n_experts
    self.x[:] = 0
    for key in candidates:
        slot = self.slot[key]
        if slot >= 0:
            self.x[2 * slot], self.x[2 * slot + 1] = inputs_of(self, key)
    run(self, (self.first_layer + layer) % self.n_networks)
    for key in candidates:
        self.scores[key] = self.y[self.slot[key]] if self.slot[key] >= 0 else -np.inf


@helper
def score_layer(self, layer):
    """Set the scores of all experts of a layer, at most once per event of it."""
    first = layer * self.n_experts
    if self.scored_at[first] != self.steps[layer]:
        see_layer(self, layer, self.x)
        run(self, (self.first_layer + layer) % self.n_networks)
        for expert in range(self.n_experts):
            self.scores[first + expert] = abs(self.y[expert])
        self.scored_at[first] = self.steps[layer]


@helper
def see_layer(self, layer, out):
    """Write 1 / recency and frequency of all experts of a layer to `out` [2E]; 0: never used."""
    for expert in range(self.n_experts):
        key = layer * self.n_experts + expert
        out[2 * expert], out[2 * expert + 1] = inputs_of(self, key)
        if not self.uses[key]:
            out[2 * expert] = 0


@helper
def inputs_of(self, key):
    """1 / recency and uses / most uses."""
    layer = key // self.n_experts
    recency = self.steps[layer] - self.last_use[key] + 1
    return np.float32(1 / recency), np.float32(self.uses[key] / self.most_uses[layer])


@helper
def run(self, network):
    """self.y = one layer's network on self.x."""
    hidden = len(self.h1)
    for j in range(hidden):
        self.h1[j] = self.b1[network, j]
        self.h2[j] = self.b2[network, j]
    for i in range(len(self.x)):
        for j in range(hidden):
            self.h1[j] += self.x[i] * self.w1[network, i, j]
    for i in range(hidden):
        silu = self.h1[i] / (1 + np.exp(-self.h1[i]))
        for j in range(hidden):
            self.h2[j] += silu * self.w2[network, i, j]
    for j in range(len(self.y)):
        self.y[j] = self.b3[network, j]
    for i in range(hidden):
        silu = self.h2[i] / (1 + np.exp(-self.h2[i]))
        for j in range(len(self.y)):
            self.y[j] += silu * self.w3[network, i, j]


@cache
def load(path: Path) -> Networks:
    """The networks of a policy file. Raises FlashMoEError when it is none."""
    tensors, about = policy_file.read(path, KIND)
    by_slots: dict[int, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        slots, _, part = name.partition(".")
        if slots.isdecimal():
            by_slots.setdefault(int(slots), {})[part] = tensor
    reading = about.get("reading") if isinstance(about, dict) else None
    if reading not in READINGS or not by_slots or not all(map(_fit, by_slots.values())):
        raise FlashMoEError(
            f"policy file {path}: its networks are of another version; train them again with "
            "`flashmoe train-policy`"
        )
    return Networks(str(reading), by_slots)


def _fit(network: Mapping[str, np.ndarray]) -> bool:
    """Do the tensors have the shapes of one set of networks?"""
    actual = {name: tensor.shape for name, tensor in network.items()}
    first = actual.get("w1", ())
    return len(first) == 3 and actual == shapes(*first)


def save(path: Path, networks: Networks, about: Mapping[str, object]) -> None:
    """Write a policy file that `load` reads. Raises FlashMoEError when it cannot be written."""
    tensors = {
        f"{slots}.{name}": tensor
        for slots, network in networks.by_slots.items()
        for name, tensor in network.items()
    }
    policy_file.save(path, KIND, tensors, {**about, "reading": networks.reading})


def shapes(layers: int, inputs: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the networks' tensors, which have an output for every two inputs."""
    return {
        "w1": (layers, inputs, hidden), "b1": (layers, hidden),
        "w2": (layers, hidden, hidden), "b2": (layers, hidden),
        "w3": (layers, hidden, inputs // 2), "b3": (layers, inputs // 2),
    }  # fmt: skip
