"""Coverage-guided fuzzing of one kind of input: `python -m harness.torture.fuzz INPUT SECONDS`.

A crash (anything but FlashMoEError getting out) ends with status 1, and libFuzzer keeps the bytes
that made it in the working directory. `nox -s fuzz` does all kinds of input.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import atheris

with atheris.instrument_imports(include=["flashmoe"], enable_loader_override=False):
    from harness.torture import untrusted

MOST_MEGABYTES = 4096  # of the whole process, torch included: more would be memory not bounded


def main(name: str, seconds: int) -> None:
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


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
