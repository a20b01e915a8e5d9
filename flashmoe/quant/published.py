"""What a format is in which checkpoints are published."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeVar

from flashmoe.quant.base import Parts, Scheme

if TYPE_CHECKING:  # an engine without torch uses this room too
    import torch

T = TypeVar("T")
# dtype and shape of each of a weight's parts
Kinds: TypeAlias = "dict[str, tuple[torch.dtype, tuple[int, ...]]]"


class Published(Scheme):
    """Turns a weight's parts into the numbers that transformers' dequantised model has.

    A parameter may be made of several weights, one above the other: their parts are told apart by
    a number, as in `0.values` and `1.values`.
    """

    method: ClassVar[str]  # the quant_method of config.json
    endings: ClassVar[Mapping[str, str]]  # part -> how its tensor's name ends, after the weight's
    unused: ClassVar[tuple[str, ...]] = ()  # endings of tensors that say what is known anyway
    has_own_loader: ClassVar[bool] = False  # transformers makes no plain model of it: we do

    @classmethod
    def reads(cls, settings: Mapping[str, Any]) -> bool:
        """May weights lie in this format, by config.json's `quantization_config`?"""
        return settings.get("quant_method") == cls.method

    @abstractmethod
    def accepts(self, kinds: Kinds, settings: Mapping[str, Any]) -> bool:
        """Are these the parts of one weight in this format, which needs no settings besides?

        settings: config.json's; none where it was asked before, when a store was packed.
        """

    def fits(self, kinds: Kinds) -> bool:
        """Are these the parts of one parameter, whose weights fit each other?"""
        weights = pieces(kinds)
        if not weights or not all(all(shape) for _, shape in kinds.values()):
            return False
        if any(weight.keys() != self.endings.keys() for weight in weights):
            return False
        if not all(self.accepts(weight, {}) for weight in weights):
            return False
        shapes = [{part: shape for part, (_, shape) in weight.items()} for weight in weights]
        return len({self.weight_shape(each)[1] for each in shapes}) == 1

    @abstractmethod
    def weight(self, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        """The numbers [out, in] that the parts of one weight stand for, in any order in memory."""

    @abstractmethod
    def weight_shape(self, parts: dict[str, tuple[int, ...]]) -> tuple[int, int]:
        """(out, in) of one weight whose parts have these shapes."""

    def random(self, rows: int, columns: int, generator: torch.Generator) -> Parts | None:
        """Parts of a weight whose numbers have a mean of about 0 and a variance of 1 / columns.

        None where nobody has needed any.
        """
        return None

    def weight_products(self, x: torch.Tensor, many: Sequence[Parts]) -> torch.Tensor | None:
        """x [many, n, in] float32, of few tokens, times the parts of weights as they lie.

        The weights are of one shape. Returns [many, n, out]; None where there is no kernel for it.
        """
        return None

    def products(self, x: torch.Tensor, many: Sequence[Parts]) -> torch.Tensor | None:
        """As `weight_products`, of parameters; x [many, n, in] in any dtype."""
        import torch

        wide = x.to(torch.float32)
        products: list[torch.Tensor] = []
        for weights in zip(*(pieces(parts) for parts in many), strict=True):
            if (product := self.weight_products(wide, weights)) is None:
                return None
            products.append(product)
        return products[0] if len(products) == 1 else torch.cat(products, 2)

    def dense(self, parts: Parts, dtype: torch.dtype, *, transposed: bool) -> torch.Tensor:
        """A parameter [out, in], or [in, out] if `transposed`, contiguous."""
        import torch

        weights = [self.weight(piece, dtype) for piece in pieces(parts)]
        if len(weights) == 1 and (weights[0].T if transposed else weights[0]).is_contiguous():
            return weights[0].T if transposed else weights[0]
        rows, columns = sum(map(len, weights)), weights[0].shape[1]
        whole = _empty((columns, rows) if transposed else (rows, columns), weights[0])
        torch.cat(weights, out=whole.T if transposed else whole)
        return whole

    def linear(self, x: torch.Tensor, parts: Parts) -> torch.Tensor:
        return x @ self.dense(parts, x.dtype, transposed=False).T

    def shape(self, parts: dict[str, tuple[int, ...]]) -> tuple[int, int]:
        shapes = [self.weight_shape(piece) for piece in pieces(parts)]
        return sum(rows for rows, _ in shapes), shapes[0][1]


def _empty(shape: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
    from flashmoe.quant import plain_memory

    if like.device.type != "cpu":
        return like.new_empty(shape)
    return plain_memory.empty(shape, like.dtype)


def piece_name(number: int, part: str) -> str:
    """What the parts of a parameter call a part of its weight of that number."""
    return f"{number}.{part}"


def pieces(parts: dict[str, T]) -> list[dict[str, T]]:
    """The parts of each weight of a parameter, in order. Raises ValueError for other names."""
    by_number: dict[int, dict[str, T]] = defaultdict(dict)
    for name, value in parts.items():
        number, _, part = name.partition(".")
        by_number[int(number)][part] = value
    return [by_number[number] for number in sorted(by_number)]
