"""Routing of other geometries, made of recorded routing: more models to learn from than we have."""

from __future__ import annotations

import numpy as np

from flashmoe.trace import Trace


def variants(trace: Trace) -> list[Trace]:
    """Of `trace`: neighbouring layers as one, distant ones as one, fewer experts a token.

    Only of a trace whose layers computed every token.
    """
    made = []
    if trace.computed is None and trace.n_layers >= 4:
        pairs = np.arange(trace.n_layers // 2 * 2).reshape(-1, 2)
        thirds = np.arange(trace.n_layers // 3 * 3).reshape(3, -1).T
        made += [merged(trace, pairs), merged(trace, thirds)]
    if trace.weights is not None and trace.top_k >= 4:
        made.append(strongest(trace, trace.top_k // 2))
    return made


def merged(trace: Trace, groups: np.ndarray) -> Trace:
    """Each of `groups` [new layers, n], layers of `trace`, as one layer of n times the experts."""
    n = groups.shape[1]
    offsets = np.arange(n) * trace.n_experts
    width = n * trace.top_k

    def join(array: np.ndarray) -> np.ndarray:
        return array[:, groups].reshape(len(array), len(groups), width)

    experts = trace.experts.astype(np.int64)[:, groups] + offsets[:, None]
    return Trace(
        experts.reshape(len(experts), len(groups), width).astype(np.uint16),
        trace.sequence,
        n * trace.n_experts,
        None if trace.weights is None else join(trace.weights),
        info=_renamed(trace, f"{n} layers as one"),
    )


def strongest(trace: Trace, top_k: int) -> Trace:
    """As if the router had chosen only the `top_k` experts that it weighs most."""
    assert trace.weights is not None
    order = np.argsort(-trace.weights.astype(np.float32), axis=-1, kind="stable")[..., :top_k]
    return Trace(
        np.take_along_axis(trace.experts, order, -1),
        trace.sequence,
        trace.n_experts,
        np.take_along_axis(trace.weights, order, -1),
        computed=trace.computed,
        info=_renamed(trace, f"the strongest {top_k} experts"),
    )


def _renamed(trace: Trace, what: str) -> dict[str, object]:
    return trace.info | {"model": f"{trace.info.get('model', 'unknown')}, {what}"}
