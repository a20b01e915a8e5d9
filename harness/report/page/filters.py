"""By what a reader filters rows and figures: machine, model, share of the model in memory."""

from __future__ import annotations

import math
import re

from harness.report import report
from harness.report.page.speeds import machine_of

BANDS = {
    "tight": "Memory for up to 25 % of the model",
    "middle": "For 26 to 60 %",
    "roomy": "For more, or no limit",
}


def band(share: float) -> str:
    """The name of a share's band; NaN is no limit."""
    if math.isnan(share) or share > 0.6:
        return "roomy"
    return "tight" if share <= 0.25 else "middle"


def marks(machine: str, model: str, share: float | None = None) -> dict[str, str]:
    """Attributes of a row or a figure; a model of "" is of all models."""
    memory = {} if share is None else {"memory": band(share)}
    return {"machine": machine, "model": model} | memory


def machine_name(machine: str) -> str:
    """A machine as people say it, from its provenance."""
    for folder in report.folders():
        if machine_of(folder.name) == machine:
            found = next(iter(report.records(folder).values()))["machine"]
            cpu = re.sub(r"\(.*?\)|\bCPU\b|\bProcessor\b|@.*", " ", found["cpu"])
            vectors = re.search(r"avx\d*", machine)
            words = [" ".join(cpu.split()), vectors[0].upper() if vectors else ""]
            return (
                f"{' '.join(filter(None, words))}, {found['cores']} cores, "
                f"{found['memory_gib']:.0f} GiB"
            )
    return machine
