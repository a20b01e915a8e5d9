"""What experts read as they were published bring in speed, against the same model in bf16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flashmoe import quant
from flashmoe.store import manifest as manifests
from harness.report import report
from harness.tables import full_scale, random_stores

SHARES = (0.25, 0.4)
# Of a limit, beside dense weights and experts: more than elsewhere, for the head's 200,000 words.
_BESIDE_BYTES = 1536 << 20


def speed(
    folder: Path,
    command: str,
    name: str,
    format: str,
    *,
    shares: Sequence[float] = SHARES,
    rounds: int = 2,
    stores: Path | None = None,
) -> None:
    """The same bytes for experts, in shares of their published size; interleaved."""
    routing = full_scale.shipped_routing(name)
    with report.scratch(stores or folder) as work:
        paths = random_stores.of_schemes(name, (quant.NONE, format), stores or work)
        contents = {scheme: manifests.load(store) for scheme, store in paths.items()}
        systems = [(quant.NONE, "flashmoe"), (format, "flashmoe"), (format, "flashmoe-fast")]
        cases = [(share, *system) for share in shares for system in systems]
        jobs = []
        for share, scheme, system in cases:
            base = full_scale.job(routing, paths[scheme], paths[scheme])
            memory_bytes = int(share * contents[format].experts_bytes)
            cap_bytes = contents[scheme].dense_bytes + _BESIDE_BYTES + memory_bytes
            jobs.append(
                replace(base, system=system, cap_bytes=cap_bytes, memory_bytes=memory_bytes)
            )
        title = f"published-{name}-{format}"
        measurements = full_scale.measure(folder, title, jobs, rounds)
    rows = []
    for (share, scheme, _), row in zip(cases, measurements, strict=True):
        plain = measurements[cases.index((share, quant.NONE, "flashmoe"))]
        kinds = {"model": name, "experts_share": share, "quant": scheme}
        rows.append(kinds | full_scale.against_bf16(row, plain, contents[scheme]))
    full_scale.publish(folder, title, rows, command)
