"""The ways in which checkpoints are damaged, or left lying about, in the field."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from flashmoe.engines.transformers.checkpoints.weight_files import INDEX_NAME

SINGLE_NAME = "model.safetensors"


class Mutant(NamedTuple):
    """A directory to be damaged, and the dice that say how."""

    folder: Path
    dice: random.Random

    @property
    def shards(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))

    def pick(self, *, matrices: bool = False) -> tuple[Path, str]:
        """A shard, and the name of one of its tensors."""
        candidates = [
            (shard, name)
            for shard in self.shards
            for name, tensor in load_file(shard).items()
            if tensor.dim() > 1 or not matrices
        ]
        return self.dice.choice(candidates)

    @contextmanager
    def tensors(self, shard: Path) -> Iterator[dict[str, torch.Tensor]]:
        """A shard's tensors, written back as they are left."""
        content = {name: tensor.clone() for name, tensor in load_file(shard).items()}
        yield content
        save_file({n: t.contiguous() for n, t in content.items()}, shard, metadata={"format": "pt"})

    @contextmanager
    def json(self, name: str) -> Iterator[dict[str, Any]]:
        path = self.folder / name
        content = json.loads(path.read_text())
        yield content
        path.write_text(json.dumps(content))


def drop(mutant: Mutant) -> None:
    shard, name = mutant.pick()
    with mutant.tensors(shard) as tensors:
        del tensors[name]


def drop_alike(mutant: Mutant) -> None:
    """All of one layer, one kind or one expert."""
    _, name = mutant.pick()
    part = mutant.dice.choice(name.split("."))
    for shard in mutant.shards:
        with mutant.tensors(shard) as tensors:
            for other in [n for n in tensors if part in n.split(".")]:
                del tensors[other]
            tensors["nothing"] = torch.zeros(1)


def rename(mutant: Mutant) -> None:
    shard, name = mutant.pick()
    new = mutant.dice.choice(
        [f"model.{name}", name.removeprefix("model."), name + "_scale", name.replace(".weight", "")]
        + [name.replace(str(n), str(n + 1), 1) for n in range(3)]
    )
    with mutant.tensors(shard) as tensors:
        tensors[new] = tensors.pop(name)


def rename_all(mutant: Mutant) -> None:
    add = mutant.dice.choice([True, False])
    for shard in mutant.shards:
        with mutant.tensors(shard) as tensors:
            for name in list(tensors):
                new = f"model.{name}" if add else name.removeprefix("model.")
                tensors[new] = tensors.pop(name)


def swap(mutant: Mutant) -> None:
    shard, name = mutant.pick()
    with mutant.tensors(shard) as tensors:
        other = mutant.dice.choice(list(tensors))
        tensors[name], tensors[other] = tensors[other], tensors[name]


def retype(mutant: Mutant) -> None:
    dtype = mutant.dice.choice(
        [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
         torch.int8, torch.int64, torch.bool]
    )  # fmt: skip
    _, name = mutant.pick()
    part = mutant.dice.choice([name, "experts", name.rpartition(".")[0], ""])
    for shard in mutant.shards:
        with mutant.tensors(shard) as tensors:
            for other in tensors:
                if part in other:
                    tensors[other] = tensors[other].to(dtype)


def resize(mutant: Mutant) -> None:
    shard, name = mutant.pick()
    with mutant.tensors(shard) as tensors:
        tensor = tensors[name]
        tensors[name] = mutant.dice.choice([
            lambda: tensor[:-1], lambda: torch.cat([tensor, tensor[:1]]), lambda: tensor.T,
            lambda: tensor.flatten(), lambda: tensor[None], lambda: tensor[..., :-1],
        ])()  # fmt: skip


def turn(mutant: Mutant) -> None:
    """The same bytes by another shape."""
    shard, name = mutant.pick(matrices=True)
    with mutant.tensors(shard) as tensors:
        shape = list(tensors[name].shape)
        mutant.dice.shuffle(shape)
        tensors[name] = tensors[name].reshape(shape)


def constant(mutant: Mutant) -> None:
    shard, name = mutant.pick()
    with mutant.tensors(shard) as tensors:
        tensors[name] = torch.full_like(tensors[name], mutant.dice.choice([0, 1, -1]))


def duplicate(mutant: Mutant) -> None:
    """A tensor again, with other values: in another shard, or under another name."""
    shard, name = mutant.pick()
    value = load_file(shard)[name]
    other = mutant.dice.choice(mutant.shards)
    with mutant.tensors(other) as tensors:
        names = [name, f"model.{name}", name.removeprefix("model."), f"language_model.{name}"]
        new = mutant.dice.choice([n for n in names if n not in tensors] or [name + "s"])
        tensors[new] = value * 1.5


def fuse(mutant: Mutant) -> None:
    """Experts one by one and, beside them, all in one."""
    shard, name = mutant.pick()
    head, marker, _ = name.partition(".experts.")
    with mutant.tensors(shard) as tensors:
        tensors[f"{head}{marker or '.mlp.experts.'}down_proj"] = torch.zeros(8, 32, 24)


def single_beside_shards(mutant: Mutant) -> None:
    """As after a second `save_pretrained`: model.safetensors, and an older index."""
    everything: dict[str, torch.Tensor] = {}
    for shard in mutant.shards:
        everything |= load_file(shard)
    factor, keep = mutant.dice.choice([1.0, 1.5]), mutant.dice.choice([True, False])
    if not keep:
        for shard in mutant.shards:
            shard.unlink()
    save_file(
        {n: (t * factor).to(t.dtype) for n, t in everything.items()},
        mutant.folder / SINGLE_NAME, metadata={"format": "pt"},
    )  # fmt: skip


def no_index(mutant: Mutant) -> None:
    (mutant.folder / INDEX_NAME).unlink(missing_ok=True)


def index_edit(mutant: Mutant) -> None:
    if not (mutant.folder / INDEX_NAME).exists():
        return single_beside_shards(mutant)
    with mutant.json(INDEX_NAME) as index:
        names = index["weight_map"]
        match mutant.dice.randrange(5):
            case 0:
                names.pop(mutant.dice.choice(list(names)))
            case 1:
                names["lm_head.weight"] = "nowhere.safetensors"
            case 2:
                names["extra"] = "../" + mutant.shards[0].name
            case 3:
                index.pop(mutant.dice.choice(list(index)))
            case 4:
                gone = mutant.dice.choice(sorted(set(names.values())))
                index["weight_map"] = {k: v for k, v in names.items() if v != gone}


def other_files(mutant: Mutant) -> None:
    """What lies beside the weights in many directories."""
    shard = mutant.dice.choice(mutant.shards)
    match mutant.dice.randrange(6):
        case 0:
            shutil.copy(shard, mutant.folder / "consolidated.safetensors")
        case 1:
            (mutant.folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
        case 2:
            (mutant.folder / "adapter_config.json").write_text("{}")
        case 3:
            shard.rename(mutant.folder / "pytorch_model.bin")
        case 4:
            shutil.copy(shard, mutant.folder / "model-00099-of-00099.safetensors")
        case 5:
            (mutant.folder / "generation_config.json").write_text("{")


def cut(mutant: Mutant) -> None:
    shard = mutant.dice.choice(mutant.shards)
    content = shard.read_bytes()
    shard.write_bytes(content[: mutant.dice.randrange(len(content))])


def _change(mutant: Mutant, change: Callable[[dict[str, Any]], None]) -> None:
    """In config.json, or in one of its sub-configurations."""
    with mutant.json("config.json") as config:
        parts = [config, *(v for k, v in config.items() if k.endswith("_config") and v)]
        change(mutant.dice.choice(parts))


def dtype(mutant: Mutant) -> None:
    value: Any = mutant.dice.choice(
        [None, "float32", "bfloat16", "float16", "float64", "int8", "many"]
    )
    with mutant.json("config.json") as config:
        for name in ("dtype", "torch_dtype"):
            config.pop(name, None)
        if value:
            config["dtype"] = value


def tie(mutant: Mutant) -> None:
    _change(mutant, lambda c: c.update(tie_word_embeddings=not c.get("tie_word_embeddings")))


def architecture(mutant: Mutant) -> None:
    with mutant.json("config.json") as config:
        name = config["architectures"][0].partition("For")[0]
        config["architectures"] = mutant.dice.choice(
            [None, [], [f"{name}ForSequenceClassification"], [f"{name}Model"],
             [f"{name}ForCausalLM"], ["LlamaForCausalLM"], ["SomethingForCausalLM"], "Olmoe"]
        )  # fmt: skip


def quantisation(mutant: Mutant) -> None:
    value = mutant.dice.choice(
        [None, {}, {"quant_method": "fp8"}, {"quant_method": "mxfp4"}, "fp8"]
    )
    _change(mutant, lambda c: c.update(quantization_config=value))


def number(mutant: Mutant) -> None:
    """A number of the configuration is another one."""

    def change(config: dict[str, Any]) -> None:
        names = [k for k, v in config.items() if type(v) in (int, float)]
        name = mutant.dice.choice(names)
        value = config[name]
        config[name] = mutant.dice.choice([value + 1, value - 1, value * 2, value // 2, 0, -1])

    _change(mutant, change)


def setting(mutant: Mutant) -> None:
    """A setting is missing, or of another kind."""

    def change(config: dict[str, Any]) -> None:
        # without its part of the configuration transformers makes one of full size, at random
        names = [k for k in config if k != "architectures" and not k.endswith("_config")]
        name = mutant.dice.choice(names)
        value: Any = mutant.dice.choice([..., None, "x", [], {}, True])
        config.pop(name) if value is ... else config.update({name: value})

    _change(mutant, change)


MUTATIONS = (
    drop, drop_alike, rename, rename_all, swap, retype, resize, turn, constant, duplicate, fuse,
    single_beside_shards, no_index, index_edit, other_files, cut, dtype, tie, architecture,
    quantisation, number, setting,
)  # fmt: skip
