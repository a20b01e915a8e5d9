"""Which experts a calibration profile shows to be popular."""

from __future__ import annotations

import numpy as np

from flashmoe.errors import FlashMoEError
from flashmoe.store.manifest import Manifest
from flashmoe.trace import Trace


def counts(profile: Trace | None, manifest: Manifest) -> np.ndarray:
    """Uses of each expert, [layers, experts].

    Raises FlashMoEError where there is no profile, or it is of another geometry.
    """
    if profile is None:
        raise FlashMoEError("this system calibrates by recorded routing: give it a trace")
    shape = (len(manifest.layers), max(layer.n_experts for layer in manifest.layers))
    if (profile.n_layers, profile.n_experts) != shape:
        raise FlashMoEError(
            f"the calibration trace is {profile.n_layers} layers x {profile.n_experts} experts, "
            f"the model {shape[0]} x {shape[1]}"
        )
    return profile.uses()


def most_popular(uses: np.ndarray, n: int) -> list[list[int]]:
    """The `n` most used (layer, expert) pairs of uses [layers, experts], by layer."""
    best = np.argsort(-uses.ravel(), kind="stable")[:n]
    layers, experts = np.unravel_index(best, uses.shape)
    return [experts[layers == layer].tolist() for layer in range(len(uses))]
