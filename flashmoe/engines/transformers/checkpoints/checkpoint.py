"""Reads a Hugging Face checkpoint tensor by tensor, in the form that the modules want."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from flashmoe.disk.shards import FileRange, Shard, TensorEntry
from flashmoe.engines.transformers.checkpoints import published_quantisation, weight_files
from flashmoe.engines.transformers.checkpoints.conversion import Conversion
from flashmoe.engines.transformers.checkpoints.expert_tensors import ExpertTensors, TensorRow
from flashmoe.engines.transformers.model import empty_model, moe_modules
from flashmoe.errors import FlashMoEError

# (parameter's full name, tensor on disk) -> its values, or what stands for them, in the
# parameter's dtype
ReadTensor = Callable[[str, TensorRow], torch.Tensor]


class Checkpoint:
    """An open checkpoint directory. Use as a context manager.

    model: its empty model. parameters: of that, by full name, on the meta device.
    experts: the model's experts modules, by name. expert_parameter_names: the full name of each
        experts' parameter -> (module's name, parameter's name in it).
    Raises FlashMoEError when it is not an MoE checkpoint that transformers can route through
    its ExpertsInterface, or a shard is missing or cut short.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = empty_model.read_config(directory)
        self._shards: list[Shard] = []
        self._shard_of: dict[str, Shard] = {}
        try:
            for file in weight_files.find(directory, self.config):
                shard = Shard(file)
                self._shards.append(shard)
                self._shard_of.update(dict.fromkeys(shard.tensors, shard))
            self.dtype = weight_files.dtype_of(directory, self.config)
            self.model = empty_model.build(self.config, self.dtype)
            self.experts = moe_modules.expert_modules(self.model)
            if not self.experts:
                raise FlashMoEError(
                    f"{directory} ({type(self.model).__name__}) has no experts that transformers "
                    f"dispatches: FlashMoE streams Mixture-of-Experts models only"
                )
            self.description = moe_modules.describe(self.model, self.config)
            self.parameters = self.model.state_dict()
            self.expert_parameter_names = moe_modules.expert_parameter_names(self.model)
            self._conversion = Conversion(directory, self.config, self.model, self._shard_of)
            entries = {name: self._entry(name) for name in self._shard_of}
            self._refuse_quantised(entries)
            n_experts = {
                full_name: moe_modules.n_experts(self.experts[module])
                for full_name, (module, _) in self.expert_parameter_names.items()
            }
            self._expert_tensors = ExpertTensors(
                directory, self._conversion.recipes, entries, n_experts
            )
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for shard in self._shards:
            shard.close()

    def _refuse_quantised(self, entries: dict[str, TensorEntry]) -> None:
        used, floats = set(), set()
        for target, recipe in self._conversion.recipes.items():
            used.update(recipe.tensor_names)
            if self.parameters[target].is_floating_point():
                floats.update(recipe.tensor_names)
        published_quantisation.refuse(self.directory, entries, used, floats)

    def _entry(self, name: str) -> TensorEntry:
        return self._shard_of[name].tensors[name]

    def dense(self, *, meta: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter and buffer on disk that belongs to no expert, one at a time.

        By its name in the model, and in the model's shape and dtype. meta: on the meta device,
        nothing is read. Raises FlashMoEError where a tensor does not fit the model.
        """
        read_tensor = self._outline if meta else self._read
        for target, recipe in self._conversion.recipes.items():
            if target not in self.expert_parameter_names:
                tensors = {
                    pattern: [read_tensor(target, TensorRow(name, None)) for name in names]
                    for pattern, names in recipe.sources.items()
                }
                for name, tensor in self._conversion.convert(target, tensors).items():
                    if name in self.parameters:
                        self._check_shape(name, tensor, tuple(self.parameters[name].shape))
                        yield name, tensor.to(self.parameters[name].dtype)

    def expert(self, module_name: str, expert: int) -> dict[str, torch.Tensor]:
        """All parameters of one expert by name, without the expert dimension, contiguous.

        Raises FlashMoEError where a tensor does not fit the model.
        """
        return self._expert(module_name, expert, self._read)

    def _expert(
        self, module_name: str, expert: int, read_tensor: ReadTensor
    ) -> dict[str, torch.Tensor]:
        result = {}
        for full_name, (module, _) in self.expert_parameter_names.items():
            if module != module_name:
                continue
            rows = self._expert_tensors.by_pattern(full_name, expert)
            tensors = {pattern: [read_tensor(full_name, row)] for pattern, row in rows.items()}
            for name, tensor in self._conversion.convert(full_name, tensors).items():
                parameter = self.parameters[name]
                self._check_shape(name, tensor, (1, *parameter.shape[1:]))
                short_name = self.expert_parameter_names[name][1]
                result[short_name] = tensor.to(parameter.dtype)[0].contiguous()
        return result

    def stored_as_used(self, module_name: str) -> dict[str, bool]:
        """By parameter: is it the bytes of its tensors on disk, one after the other, unconverted?

        An expert of counted words is converted in place of a real one, whose weights may be alike
        by chance. So whatever transformers does beside putting tensors side by side shows, such
        as transposing, interleaving or casting them.
        """
        bytes_of: dict[TensorRow, torch.Tensor] = {}

        def counted(full_name: str, tensor_row: TensorRow) -> torch.Tensor:
            entry = self._entry(tensor_row.name)
            shape = entry.shape if tensor_row.row is None else (1, *entry.shape[1:])
            size_bytes = math.prod(shape) * entry.dtype.itemsize
            first, count = len(bytes_of), -(-size_bytes // 4)
            words = torch.arange(first, first + count, dtype=torch.int32) * 2654435
            bytes_of[tensor_row] = words.view(torch.uint8)[:size_bytes]
            tensor = bytes_of[tensor_row].view(entry.dtype).view(shape)
            return tensor.to(self.parameters[full_name].dtype)

        result = {}
        for name, parameter in self._expert(module_name, 0, counted).items():
            full_name = f"{module_name}.{name}"
            tensor_names = self._conversion.recipes[full_name].tensor_names
            rows = self._expert_tensors.in_order(full_name, 0)
            stored = torch.cat([bytes_of[row] for row in rows])
            same_dtype = {self._entry(tensor).dtype for tensor in tensor_names} == {parameter.dtype}
            used = parameter.view(-1).view(torch.uint8)
            result[name] = same_dtype and torch.equal(stored, used)
        return result

    def places(self, module_name: str, name: str, expert: int) -> list[FileRange]:
        """Where the tensors lie that one parameter of one expert is made of, in order."""
        rows = self._expert_tensors.in_order(f"{module_name}.{name}", expert)
        return [self._shard_of[tensor].place(tensor, row) for tensor, row in rows]

    def dense_bytes(self) -> int:
        """Bytes of what `dense` yields, in the model's dtypes."""
        experts = self.expert_parameter_names
        dense = (p for name, p in self.parameters.items() if name not in experts)
        return sum(parameter.numel() * parameter.element_size() for parameter in dense)

    def forget_pages(self) -> None:
        """Let the kernel drop the shards' pages, so that a pack does not fill the page cache."""
        for shard in self._shards:
            shard.forget_pages()

    def _read(self, full_name: str, tensor_row: TensorRow) -> torch.Tensor:
        """A tensor on disk, cast as transformers does before it converts it."""
        name, row = tensor_row
        return self._shard_of[name].read(name, row).to(self.parameters[full_name].dtype)

    def _outline(self, full_name: str, tensor_row: TensorRow) -> torch.Tensor:
        """What `_read` gives of a whole tensor, on the meta device."""
        entry = self._entry(tensor_row.name)
        tensor = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        return tensor.to(self.parameters[full_name].dtype)

    def _check_shape(self, name: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
        if tuple(tensor.shape) != expected:
            raise FlashMoEError(
                f"{self.directory}: {name} has shape {list(tensor.shape)} on disk, "
                f"the model wants {list(expected)}; config.json and weights do not match"
            )
