"""Coverage-guided fuzzing of one kind of input, by atheris."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import atheris

from flashmoe.errors import FlashMoEError

with atheris.instrument_imports(include=["flashmoe"], enable_loader_override=False):
    from harness.torture import untrusted

MOST_MEGABYTES = 4096  # of the whole process, torch included: more would be memory not bounded


def fuzz(name: str, seconds: int) -> None:
    """Ends the process, with a status other than 0 after a crash."""
    if name not in untrusted.INPUTS:
        raise FlashMoEError(f"no input {name!r}: choose from {', '.join(untrusted.INPUTS)}")
    what = untrusted.INPUTS[name]
    with TemporaryDirectory(prefix="flashmoe-fuzz-") as folder:
        path = what.make(Path(folder))
        seeds = Path(folder) / "seeds"
        seeds.mkdir()
        (seeds / "valid").write_bytes(path.read_bytes())
        arguments = [
            sys.argv[0], f"-max_total_time={seconds}", f"-rss_limit_mb={MOST_MEGABYTES}",
            "-timeout=20", str(seeds),
        ]  # fmt: skip
        atheris.Setup(arguments, lambda content: untrusted.survives(what, path, content))
        atheris.Fuzz()
