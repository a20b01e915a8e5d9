"""A transformers model at memory="auto" that generates whenever a line comes on stdin: `STORE`.

Each is answered by a line of JSON. A second argument is the seconds for which memory must have been
enough before the budget grows.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import flashmoe
from flashmoe.memory import following
from harness.torture.usage import usage

_PROMPT, _NEW = 240, 20


def main(store: Path) -> None:
    torch.set_num_threads(1)
    model = flashmoe.load(store, memory="auto", policy="lru")
    ids = torch.arange(3, 3 + _PROMPT)[None]
    for _ in sys.stdin:
        with torch.inference_mode():
            tokens = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=_NEW, do_sample=False
            )
        print(json.dumps({"tokens": tokens[0].tolist()} | usage(model.flashmoe)), flush=True)


if __name__ == "__main__":
    if sys.argv[2:]:
        following.CALM_SECONDS = float(sys.argv[2])
    main(Path(sys.argv[1]))
