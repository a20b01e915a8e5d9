"""Reads a Hugging Face checkpoint tensor by tensor, in the form that the modules want."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from itertools import chain
from pathlib import Path

import torch

from flashmoe.disk.shards import FileRange, Shard, TensorEntry
from flashmoe.engines.transformers.checkpoints import (
    published_experts,
    published_quantisation,
    weight_files,
)
from flashmoe.engines.transformers.checkpoints.conversion import Conversion
from flashmoe.engines.transformers.checkpoints.expert_tensors import ExpertTensors, TensorRow
from flashmoe.engines.transformers.checkpoints.published_experts import PublishedExperts
from flashmoe.engines.transformers.model import empty_model, moe_modules
from flashmoe.errors import FlashMoEError
from flashmoe.quant import part_name

# (parameter's full name, tensor on disk) -> its values, or what stands for them, in the
# parameter's dtype
ReadTensor = Callable[[str, TensorRow], torch.Tensor]


class Checkpoint:
    """An open checkpoint directory. Use as a context manager.

    model: its empty model. parameters: of that, by full name, on the meta device.
    experts: the model's experts modules, by name. expert_parameter_names: the full name of each
        experts' parameter -> (module's name, parameter's name in it).
    published: the format in which the experts' weights lie, and their parts, if any.
    Raises FlashMoEError when it is not an MoE checkpoint that transformers can route through
    its ExpertsInterface, or a shard is missing or cut short.
    """

    gives_back = False  # see `store.writer.Source`

    def __init__(self, directory: Path, *, dequantise: bool = False) -> None:
        """dequantise: experts that were published quantised are read as the model has them."""
        self.directory = directory
        self.config = empty_model.read_config(directory)
        self._shards: list[Shard] = []
        self._shard_of: dict[str, Shard] = {}
        try:
            for file in weight_files.find(directory, self.config):
                shard = Shard(file)
                self._shards.append(shard)
                self._shard_of.update(dict.fromkeys(shard.tensors, shard))
            entries = {name: self._entry(name) for name in self._shard_of}
            settings = published_quantisation.settings_of(self.config)
            dequantiser = published_quantisation.dequantiser(directory, self.config, entries)
            self.dtype = weight_files.dtype_of(directory, self.config, dequantiser)
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
            self._conversion = Conversion(
                directory, self.config, self.model, self._shard_of, dequantiser
            )
            self._refuse_quantised(entries, said=dequantiser is not None)
            n_experts = {
                full_name: moe_modules.n_experts(self.experts[module])
                for full_name, (module, _) in self.expert_parameter_names.items()
            }
            self._expert_tensors = ExpertTensors(
                directory, self._conversion.recipes, entries, n_experts
            )
            self.published = (
                None
                if dequantise or dequantiser is None
                else published_experts.find(
                    settings,
                    self._expert_tensors,
                    entries,
                    {n: tuple(self.parameters[n].shape[1:]) for n in self.expert_parameter_names},
                )
            )
            if self.published:
                self._check_published(self.published)
                self.description = self.published.described(self.description)
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

    def _refuse_quantised(self, entries: dict[str, TensorEntry], said: bool) -> None:
        """said: by config.json, so that it can be made plain."""
        recipes = self._conversion.recipes
        floats = [
            recipe.tensor_names
            for target, recipe in recipes.items()
            if self.parameters[target].is_floating_point()
        ]
        if said:
            published_quantisation.refuse_incomplete(self.directory, entries, floats)
        else:
            used = {name for recipe in recipes.values() for name in recipe.tensor_names}
            published_quantisation.refuse_unsaid(self.directory, entries, used, {*chain(*floats)})

    def _check_published(self, published: PublishedExperts) -> None:
        """Raises FlashMoEError unless parts stand for what transformers makes of them.

        Of one expert, for each kind of parts that there is.
        """
        seen = []
        for full_name, kinds in published.kinds.items():
            module, name = self.expert_parameter_names[full_name]
            kind = type(self.experts[module]), name, kinds
            if kind in seen:
                continue
            seen.append(kind)
            theirs = self._expert(module, 0, self._read, only=full_name)[name]
            parts = {part: self._row(row) for part, row in published.rows(full_name, 0).items()}
            ours = published.format.dense(
                parts, theirs.dtype, transposed=bool(self.experts[module].is_transposed)
            )
            if not torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)):
                raise FlashMoEError(
                    f"{self.directory}: transformers makes other numbers of {full_name} than "
                    f"FlashMoE's {published.format.name}: report it, or use a checkpoint that is "
                    "not quantised"
                )

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

        The parts of those that lie in a published format, as they are. Raises FlashMoEError where
        a tensor does not fit the model.
        """
        result = self._expert(module_name, expert, self._read)
        for full_name, (module, name) in self.expert_parameter_names.items():
            if module == module_name and full_name in self._in_parts:
                rows = self._rows_of_parts(full_name, expert)
                result |= {
                    part_name(name, part): self._row(row).contiguous() for part, row in rows.items()
                }
        return result

    @property
    def _in_parts(self) -> Collection[str]:
        """The full names of experts' parameters that lie in a published format."""
        return self.published.kinds if self.published else ()

    def _rows_of_parts(self, full_name: str, expert: int) -> dict[str, TensorRow]:
        return self.published.rows(full_name, expert) if self.published else {}

    def _expert(
        self, module_name: str, expert: int, read_tensor: ReadTensor, only: str | None = None
    ) -> dict[str, torch.Tensor]:
        """Parameters as the model has them; only: the full name of one; default: all plain ones."""
        result = {}
        for full_name, (module, _) in self.expert_parameter_names.items():
            wanted = full_name not in self._in_parts if only is None else full_name == only
            if module != module_name or not wanted:
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
            return self._cast(full_name, tensor)

        result = {}
        for name, parameter in self._expert(module_name, 0, counted).items():
            full_name = f"{module_name}.{name}"
            tensor_names = self._conversion.recipes[full_name].tensor_names
            rows = self._expert_tensors.by_pattern_in_order(full_name, 0)
            stored = torch.cat([bytes_of[row] for _, row in rows])
            same_dtype = {self._entry(tensor).dtype for tensor in tensor_names} == {parameter.dtype}
            used = parameter.view(-1).view(torch.uint8)
            result[name] = same_dtype and torch.equal(stored, used)
        return result

    def places(self, module_name: str, name: str, expert: int) -> list[FileRange]:
        """Where the tensors lie that one parameter, or part of one, of one expert is made of.

        They are in order. name: as `expert` has it.
        """
        parameter, _, part = name.partition("/")
        full_name = f"{module_name}.{parameter}"
        if part:
            rows = [self._rows_of_parts(full_name, expert)[part]]
        else:
            rows = [r for _, r in self._expert_tensors.by_pattern_in_order(full_name, expert)]
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
        return self._cast(full_name, self._shard_of[name].read(name, row))

    def _row(self, tensor_row: TensorRow) -> torch.Tensor:
        """A tensor on disk, or a row of it without the expert dimension, as it is."""
        name, row = tensor_row
        tensor = self._shard_of[name].read(name, row)
        return tensor if row is None else tensor[0]

    def _cast(self, full_name: str, tensor: torch.Tensor) -> torch.Tensor:
        return self._conversion.cast(full_name, tensor, self.parameters[full_name].dtype)

    def _outline(self, full_name: str, tensor_row: TensorRow) -> torch.Tensor:
        """What `_read` gives of a whole tensor, on the meta device."""
        entry = self._entry(tensor_row.name)
        tensor = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        return self._cast(full_name, tensor)

    def _check_shape(self, name: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
        if tuple(tensor.shape) != expected:
            raise FlashMoEError(
                f"{self.directory}: {name} has shape {list(tensor.shape)} on disk, "
                f"the model wants {list(expected)}; config.json and weights do not match"
            )
