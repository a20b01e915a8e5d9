"""What a quantisation scheme is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypeAlias, TypeVar

if TYPE_CHECKING:  # an engine without torch uses this room too
    import torch

Parts: TypeAlias = "dict[str, torch.Tensor]"
T = TypeVar("T")


class Scheme(ABC):
    """Holds a weight [out, in] in parts that take fewer bytes, and multiplies by them.

    They lie so on the SSD and in the slots. The result depends on the parts alone, not on where
    they lie or came from.
    """

    name: ClassVar[str]
    device_types: ClassVar[tuple[str, ...]] = ()  # which devices have a kernel for it; (): all

    @abstractmethod
    def linear(self, x: torch.Tensor, parts: Parts) -> torch.Tensor:
        """x [n, in] -> [n, out], in x's dtype."""

    @abstractmethod
    def shape(self, parts: dict[str, tuple[int, ...]]) -> tuple[int, int]:
        """(out, in) of the weight whose parts have these shapes."""

    def layout(self) -> str:
        """A name for the order of the parts' bytes, where that differs between machines."""
        return ""


class Quantiser(Scheme):
    """Makes the parts, out of a weight of more bytes, while a store is packed."""

    @abstractmethod
    def parts(self, weight: torch.Tensor) -> Parts:
        """The parts of `weight` [out, in]. Raises FlashMoEError for a shape it cannot take."""


class Weight(NamedTuple):
    """A quantised weight, in place of a tensor among an expert's parameters."""

    scheme: Scheme
    parts: Parts

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        return self.scheme.linear(x, self.parts)


# Of one expert, by the module's parameter names.
Parameters: TypeAlias = "dict[str, torch.Tensor | Weight]"


def part_name(weight: str, part: str) -> str:
    """What a store calls a part of a weight."""
    return f"{weight}/{part}"


def by_weight(stored: dict[str, T]) -> tuple[dict[str, T], dict[str, dict[str, T]]]:
    """An expert's tensors by name, in two: those stored whole, and the parts of each weight."""
    plain: dict[str, T] = {}
    parts: dict[str, dict[str, T]] = defaultdict(dict)
    for name, value in stored.items():
        weight, slash, part = name.partition("/")
        if slash:
            parts[weight][part] = value
        else:
            plain[name] = value
    return plain, parts
