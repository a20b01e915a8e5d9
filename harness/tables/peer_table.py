"""The table against engines that are not ours, on the same weights and routing, real caps."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from flashmoe import quant, trace
from flashmoe.engines.transformers.checkpoints.named_models import config_of, total_bytes
from flashmoe.engines.transformers.checkpoints.synth import synthesise_store
from flashmoe.errors import FlashMoEError
from flashmoe.store import manifest as manifests
from harness.progress import say
from harness.report import report
from harness.runs import peers
from harness.runs.self_routing_weights import SteeredWeights
from harness.tables import full_scale, speedups


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
    """Write the same weights for every engine (given back but for `stores`), run, report."""
    routing = full_scale.shipped_routing(name)
    recorded = trace.load(routing.trace).named(routing.sequence)
    with report.scratch(stores or folder) as work:
        home = stores or work
        store = home / "steered-store"
        base = full_scale.job(routing, store, store)
        prefix = recorded.first(base.prompt_tokens + base.tokens)
        weights = partial(SteeredWeights, trace=prefix)
        if not manifests.is_store(store):
            say(f"writing {name} with random weights and solved routers")
            synthesise_store(name, store, weights=weights, quant=scheme)
        systems = {speedups.OURS: store}
        for peer in peers.available().values():
            path = home / f"steered-{peer.name}"
            if not peer.installed():
                say(f"{peer.name} is not installed: `nox -s peers` installs it; left out")
                continue
            try:
                if not path.exists():
                    say(f"writing the same for {peer.name}")
                    partial_path = path.with_name(f"{path.name}.partial")
                    _remove(partial_path)
                    peer.write(weights(config_of(name), 0), partial_path, scheme)
                    partial_path.rename(path)
                systems[peer.name] = path
            except FlashMoEError as error:
                say(f"{peer.name} is left out: {error}")
        if len(systems) == 1:
            raise FlashMoEError("there is no peer to compare with: run `nox -s peers`")
        manifest = manifests.load(store)
        total = total_bytes(name)  # of bf16, whatever the scheme: caps are bytes
        jobs = [
            replace(capped, system=system, checkpoint=path)
            for share in caps
            if full_scale.fits(share * total)
            for capped in [full_scale.with_cap(base, manifest, share * total)]
            for system, path in systems.items()
        ]
        title = full_scale.title_of("peers", name, scheme)
        measurements = full_scale.measure(folder, title, jobs, rounds)
    rows = full_scale.label_rows(measurements, name, full_scale.SHIPPED, routing, total)
    full_scale.publish_tokens(folder, title)
    full_scale.publish(folder, title, rows, command)


def _remove(path: Path) -> None:
    """A file or a directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
