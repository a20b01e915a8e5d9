"""AirLLM on the CPU: transformers' model, a decoder layer's weights loaded when it runs.

It comes with a transformers of its own time (4.57.6 for models with experts), hence in an
environment of its own. Its checkpoint has one shard a layer, which it links to where others
would be split first.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.runs import peers
from harness.runs.job import Job

if TYPE_CHECKING:  # writing happens where the harness is, running where AirLLM is
    import torch

    from flashmoe.engines.transformers.checkpoints.random_weights import RandomWeights


def write(source: RandomWeights, path: Path, scheme: str) -> None:
    """A Hugging Face directory as OLMoE's and Qwen3-MoE's are on the hub, bf16.

    Memory is bounded by a layer without its experts. Raises FlashMoEError for other schemes.
    """
    import torch

    import flashmoe
    from flashmoe import quant
    from flashmoe.disk.shards import header
    from flashmoe.errors import FlashMoEError

    if scheme != quant.NONE:
        raise FlashMoEError(f"AirLLM quantises for GPUs only: no {scheme}")
    path.mkdir()
    groups = itertools.groupby(source.dense(), key=lambda pair: _owner(pair[0]))
    weight_map: dict[str, str] = {}
    last = len(source.experts) + 3  # embeddings, layers, norm, head
    for number, (owner, dense) in enumerate(groups, start=1):
        file_name = f"model-{number:05}-of-{last:05}.safetensors"
        dense_tensors = dict(dense)
        shapes = {
            name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in dense_tensors.items()
        }
        outline = _experts(source, owner, partial(_outline, source))
        shapes |= {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in outline}
        weight_map |= dict.fromkeys(shapes, file_name)
        with open(path / file_name, "wb") as file:
            file.write(header(shapes))
            for _, tensor in itertools.chain(
                dense_tensors.items(), _experts(source, owner, source.expert)
            ):
                file.write(tensor.contiguous().view(torch.uint8).numpy().data)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    source.config.save_pretrained(path)
    shutil.copy(flashmoe.demo_path() / "tokenizer.json", path)  # it asks for one; never used
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def _owner(key: str) -> str:
    """The module that AirLLM loads at once: `model.layers.3`, or the whole of another."""
    parts = key.split(".")
    return ".".join(parts[:3]) if parts[:2] == ["model", "layers"] else key.rpartition(".")[0]


def _experts(
    source: RandomWeights, owner: str, tensors_of: Callable[[str, int], dict[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a layer's experts, by their names on the hub."""
    from flashmoe.engines.transformers.model import moe_modules

    for module_name, module in source.experts.items():
        if not module_name.startswith(f"{owner}."):
            continue
        for expert in range(moe_modules.n_experts(module)):
            tensors = tensors_of(module_name, expert)
            gate, up = tensors["gate_up_proj"].chunk(2)
            for part, tensor in zip(
                ("gate_proj", "up_proj", "down_proj"), (gate, up, tensors["down_proj"]), strict=True
            ):
                yield f"{module_name}.{expert}.{part}.weight", tensor


def _outline(source: RandomWeights, module_name: str, expert: int) -> dict[str, torch.Tensor]:
    """As `source.expert`, on the meta device: shapes without drawing gigabytes for them."""
    from flashmoe.engines.transformers.model import moe_modules

    parameters = moe_modules.expert_parameters(source.experts[module_name])
    return {name: parameter[expert] for name, parameter in parameters.items()}


def run(job: Job) -> dict[str, Any]:
    return peers.decode(
        job, _load, "a decoder layer at a time, loaded when it runs, the next one beside it"
    )


def _load(job: Job) -> peers.Forward:
    import airllm
    import torch

    model = airllm.AutoModel.from_pretrained(str(job.checkpoint), device="cpu")
    cache = None

    @torch.inference_mode()
    def forward(tokens: list[int]) -> int:
        nonlocal cache
        output = model(input_ids=torch.tensor([tokens]), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        return int(output.logits[0, -1].argmax())

    return forward


if __name__ == "__main__":
    peers.program(run, "airllm")
