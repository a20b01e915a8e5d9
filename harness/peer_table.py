"""The table against engines that are not ours, on the same weights and routing, real caps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from flashmoe import quant, trace
from flashmoe.errors import FlashMoEError
from flashmoe.store import manifest as manifests
from flashmoe.synth import config_of, synthesise_store, total_bytes
from harness import full_scale, peers, plots, report, speedups
from harness.say import say
from harness.steered import SteeredWeights

SYSTEMS = (speedups.OURS,)


def peer_table(
    folder: Path,
    command: str,
    name: str,
    *,
    caps: Sequence[float] = full_scale.CAPS,
    rounds: int = 1,
    stores: Path | None = None,
    scheme: str = quant.NONE,
) -> None:
    """Write store and GGUF file (given back afterwards, but for `stores`), run, report."""
    try:
        from harness import gguf_file
    except ImportError as error:
        raise FlashMoEError(f"{error.name} is missing: run `nox -s peers`") from None
    model = full_scale.MODELS[name]
    routing = trace.load(model.routing).named(model.sequence)
    with report.scratch(stores or folder) as work:
        home = stores or work
        store, peer_file = home / "steered-store", home / "steered.gguf"
        base = full_scale.job(model, peer_file, store)
        if not peer_file.exists():
            say(f"writing {name} with random weights and solved routers")
            seen = routing.first(base.prompt_tokens + base.tokens)
            weights = partial(SteeredWeights, trace=seen)
            synthesise_store(name, store, weights=weights, quant=scheme)
            say("writing the same as GGUF")
            gguf_file.write(weights(config_of(name), 0), peer_file, scheme)
        manifest = manifests.load(store)
        total = total_bytes(name)  # of bf16, whatever the scheme: caps are bytes
        jobs = [
            replace(capped, system=system)
            for share in caps
            if full_scale.fits(share * total)
            for capped in [full_scale.capped(base, manifest, share * total)]
            for system in (*SYSTEMS, *peers.available())
        ]
        title = f"peers-{name}" + ("" if scheme == quant.NONE else f"-{scheme}")
        found = full_scale.measured(folder, title, jobs, rounds)
    rows = full_scale.named(found, name, full_scale.SHIPPED, model, total)
    plots.speedups(full_scale.published(folder, title, rows, command), folder, title)
