"""What one run is told to do."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

FIRST_TOKEN = 1000  # of a full-scale run's prompt, whose ids count up from it
STEERED_TOKENS = 160  # so many have recorded experts; a longer prompt says them again and again


def prompt_ids(tokens: int) -> list[int]:
    """A full-scale run's prompt of so many tokens; whatever its length, it ends as any other."""
    period = min(tokens, STEERED_TOKENS)
    return [FIRST_TOKEN + (number - tokens) % period for number in range(tokens)]


@dataclass(frozen=True)
class Job:
    """What to run. `sequence` makes it a full-scale run: a made-up prompt, recorded experts."""

    system: str
    checkpoint: Path
    store: Path
    memory_bytes: int
    prompt: str
    new_tokens: int
    routing: Path | None = None  # recorded on the model; systems that calibrate do so by it
    sequence: str = ""  # of `routing`: take the experts from it, and calibrate by the others
    forced: bool = True  # False: the weights lead to recorded experts by themselves
    prompt_tokens: int = 0  # with `sequence`, the prompt's length in place of its text
    warm_up_tokens: int = 0  # decoded before measuring, so that the cache is at its working state
    cap_bytes: int | None = None  # the kernel's limit on the process, page cache included
    read_bytes_per_second: int | None = None  # the kernel's limit on its reading
    timeline: bool = False  # say when, within the last token, what was read and computed
    decode_seconds: float | None = None  # stop after so many, though tokens are missing
    scratch: Path | None = None  # a folder that is removed when the run has ended

    @property
    def tokens(self) -> int:
        """To be generated: prefill gives the first, then come warm-up and what is measured."""
        return 1 + self.warm_up_tokens + self.new_tokens

    def to_json(self) -> str:
        return json.dumps(
            {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}
        )

    @classmethod
    def from_json(cls, text: str) -> Job:
        values = json.loads(text)
        for key in ("checkpoint", "store", "routing", "scratch"):
            values[key] = Path(values[key]) if values[key] else None
        return cls(**values)
