"""A checkpoint's files read and rewritten, and what the model in them gives."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import prompt

from baselines.in_memory import with_own_memory
from harness import tiny_models


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        n: t for shard in sorted(folder.glob("*.safetensors")) for n, t in load_file(shard).items()
    }


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """All weights in one file, in place of what was there."""
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@torch.inference_mode()
def output(model: transformers.PreTrainedModel) -> torch.Tensor:
    return tiny_models.output(model(prompt(13)))


def plain(folder: Path, model_class=transformers.AutoModelForCausalLM) -> torch.Tensor:
    model = model_class.from_pretrained(folder, experts_implementation="eager")
    return output(with_own_memory(model))
