"""`flashmoe.load` and transformers' `generate`, asked line by line: `MODEL MEMORY`.

A line is a JSON object with `prompt` and `tokens`; its answer has `text`, `tokens`, `seconds`.
"""

from __future__ import annotations

import json
import sys
import time

import torch
import transformers

import flashmoe


def main(path: str, memory: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = flashmoe.load(path, memory=memory)
    for line in sys.stdin:
        asked = json.loads(line)
        inputs = tokenizer(asked["prompt"], return_tensors="pt")
        started = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=asked["tokens"], do_sample=False)
        seconds = time.perf_counter() - started
        new = out[0, inputs["input_ids"].shape[1] :]
        answer = {"text": tokenizer.decode(new, skip_special_tokens=True), "tokens": len(new)}
        print(json.dumps(answer | {"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
