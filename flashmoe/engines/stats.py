"""What an engine counted."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Stats:
    """Counts since load or the last reset, in experts, bytes and seconds."""

    policy: str
    """Its name, as given to `load`."""
    shared: bool
    """One cache serves all layers."""
    slots: int
    """Slots of all caches, spare and bypass ones left out."""
    slots_per_layer: float
    """Slots that a layer has, or its share of those of all layers. Of a fraction, the lowest layers
    have one more than the others, unless they share."""
    bypass_slots: int
    """Slots for a token's experts that their cache does not keep; 0: it keeps every one."""
    requests: int
    """Distinct (forward step, layer, expert)."""
    hits: int
    """Requests for experts that were resident when the step reached the layer."""
    prefetch_layers: int
    """Layers whose experts can be guessed ahead; 0 where prefetching is off or does not pay."""
    prefetch_used: int
    """Misses that a guess had begun to read."""
    prefetch_wasted: int
    """Guesses begun in vain."""
    prefetch_wasted_bytes: int
    """Bytes read for those."""
    prefetch_off: int
    """Times that a layer was not guessed, because guesses cost more than they saved of late."""
    bytes_read: int
    """From the drive, for misses and guesses."""
    bytes_by_drive: list[int]
    """What came from each drive since load, where there are several; the first is the model's own
    path. What was read again, and what nobody waited for, is counted too."""
    read_seconds: float
    """Time with a read in flight."""
    wait_seconds: float
    """The part of it in which the model stood still."""
    compute_seconds: float
    """Expert arithmetic; on an accelerator, the time to hand it over, which is not waited for."""
    experts_seconds: float
    """All time inside the experts modules."""
    policy_seconds: float
    """The cache's and its policy's part of that."""
    resident_bytes: int
    """Experts in slots now, spare and bypass slots included."""
    peak_resident_bytes: int
    """The most that `resident_bytes` was."""
    memory_bytes: int
    """The budget; where `memory` is "auto", the present one."""
    grew: int
    """How often it grew, as memory="auto" follows what is free."""
    shrank: int
    """How often it gave back."""
    direct_io: bool
    """Reads bypass the page cache."""
    arithmetic: str
    """Whose kernels multiply: exact, fast (see `transformers.loading.load`), or llama.cpp's."""
    kernels: dict[str, str]
    """In fast arithmetic, by the shape of a weight, what multiplies up to so many tokens."""

    @property
    def misses(self) -> int:
        return self.requests - self.hits

    @property
    def hit_rate(self) -> float:
        """Hits over requests; 0 before the first."""
        return self.hits / self.requests if self.requests else 0.0

    def as_dict(self) -> dict[str, Any]:
        """By name, `misses` and `hit_rate` included."""
        return asdict(self) | {"misses": self.misses, "hit_rate": self.hit_rate}

    def for_replay(self) -> dict[str, Any]:
        """What a trace of the run says of it, so that a replay gives the same hits."""
        return {
            "policy": self.policy, "slots": self.slots_per_layer,
            "bypass_slots": self.bypass_slots, "requests": self.requests, "hits": self.hits,
        }  # fmt: skip
