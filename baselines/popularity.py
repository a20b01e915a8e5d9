"""Which experts a calibration profile shows to be popular."""

from __future__ import annotations

import numpy as np

from flashmoe.errors import FlashMoEError
from flashmoe.store.manifest import Manifest
from flashmoe.trace import Trace


def counts(profile: Trace | None, manifest: Manifest, decoded_only: bool = False) -> np.ndarray:
    """Uses of each expert, [layers, experts]; those of prompts too unless `decoded_only`.

    Raises FlashMoEError where there is no profile, it is of another geometry, or nothing of it
    was decoded.
    """
    if profile is None:
        raise FlashMoEError("this system calibrates by recorded routing: give it a trace")
    layers, experts = shape(manifest)
    if (profile.n_layers, profile.n_experts) != (layers, experts):
        raise FlashMoEError(
            f"the calibration trace is {profile.n_layers} layers x {profile.n_experts} experts, "
            f"the model {layers} x {experts}"
        )
    return (_decoded(profile) if decoded_only else profile).uses()


def shape(manifest: Manifest) -> tuple[int, int]:
    """Layers, and experts of the largest layer."""
    return len(manifest.layers), max(layer.n_experts for layer in manifest.layers)


def _decoded(profile: Trace) -> Trace:
    """The tokens that came alone; all where the trace does not tell, as if text were decoded."""
    steps = [step for _, tokens in profile.sequences() for step in profile.steps(tokens)]
    alone = [step.start for step in steps if step.stop - step.start == 1]
    if not alone:
        raise FlashMoEError(
            "this system calibrates by decoded tokens, of which the trace has none: record one "
            "with more than one new token"
        )
    computed = None if profile.computed is None else profile.computed[alone]
    experts, sequence = profile.experts[alone], profile.sequence[alone]
    return Trace(experts, sequence, profile.n_experts, computed=computed)


def by_chance(shape: tuple[int, int], seed: int) -> np.ndarray:
    """In place of `counts`: every expert another number, in a random order."""
    layers, experts = shape
    return np.random.default_rng(seed).permutation(layers * experts).reshape(shape)


def most_popular(uses: np.ndarray, n: int) -> list[list[int]]:
    """The `n` most used (layer, expert) pairs of uses [layers, experts], by layer."""
    best = np.argsort(-uses.ravel(), kind="stable")[:n]
    layers, experts = np.unravel_index(best, uses.shape)
    return [experts[layers == layer].tolist() for layer in range(len(uses))]


def most_popular_by_layer(uses: np.ndarray, n: int) -> list[list[int]]:
    """An equal quota of each layer's most used; what `n` leaves over goes to the most used of all.

    uses [layers, experts] -> experts by layer.
    """
    quota = n // len(uses)
    chosen = [np.argsort(-row, kind="stable")[:quota].tolist() for row in uses]
    left = uses.astype(np.int64)  # a copy
    for layer, experts in enumerate(chosen):
        left[layer, experts] = -1
    rest = most_popular(left, n - quota * len(uses))
    return [quota_of + more for quota_of, more in zip(chosen, rest, strict=True)]
