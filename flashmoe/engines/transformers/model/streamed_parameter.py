"""Stands in a model for an expert parameter whose values stay on the SSD."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from flashmoe.errors import FlashMoEError

# Attributes of torch.Tensor that need no values. Those that this torch lacks are passed over.
_METHODS = (
    "size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "storage_offset",
    "is_floating_point", "is_complex", "is_contiguous", "is_shared", "is_pinned", "is_inference",
    "requires_grad_", "detach", "__len__", "__hash__",
)  # fmt: skip
_PROPERTIES = (
    "shape", "ndim", "dtype", "layout", "nbytes", "itemsize", "requires_grad", "grad", "grad_fn",
    "is_leaf", "data", "is_cpu", "is_cuda", "is_sparse", "is_sparse_csr", "is_quantized",
    "is_mkldnn", "is_nested", "is_mps", "is_xpu", "retains_grad", "output_nr", "names", "_version",
    "_backward_hooks", "_post_accumulate_grad_hooks", "is_ipu", "is_vulkan", "is_xla", "is_mtia",
    "is_hpu", "is_maia",
)  # fmt: skip


class StreamedParameter(nn.Parameter):
    """Has the shape, dtype and device of one parameter of all experts, and no values.

    shape: [experts, ...]; device: the one that computes. Arithmetic, casts, copies, in-place
    changes, pickling and saving raise FlashMoEError, so that no library can work on values that
    are not there.
    """

    _device: torch.device
    _is_hf_initialized: bool

    def __new__(cls, parameter: torch.Tensor, device: torch.device) -> StreamedParameter:
        """parameter: on the meta device, [experts, ...]."""
        placeholder = torch.Tensor._make_subclass(cls, parameter.detach(), False)
        placeholder._device = device
        return placeholder

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        arguments: Sequence[Any] = (),
        named: Mapping[str, Any] | None = None,
    ) -> Any:
        if function == _DEVICE:
            return arguments[0]._device
        if function == _IS_META:
            return False
        if function not in _HARMLESS:
            raise refusal(f"torch's {_name_of(function)}")
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*arguments, **(named or {}))
        if isinstance(result, torch.Tensor) and result is not arguments[0]:  # as of `detach`
            return cls(result, arguments[0]._device)
        return result

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"StreamedParameter({list(self.shape)}, {self.dtype}, on the SSD)"

    def __deepcopy__(self, memo: object) -> StreamedParameter:
        raise refusal("a copy")

    def __reduce_ex__(self, protocol: object) -> Any:
        raise refusal("pickling")


def refusal(what: str) -> FlashMoEError:
    """The error for whatever needs the values; what: the operation, to begin a sentence."""
    return FlashMoEError(
        f"{what} needs all experts of this model in memory, but they stay on the SSD: FlashMoE "
        "computes with them where they are and can neither change, copy, move nor save them; "
        "load the model with transformers for that"
    )


def _name_of(function: Callable[..., Any]) -> str:
    """Such as `add`; of an attribute's `__get__`, the attribute's name."""
    owner = getattr(function, "__self__", None)
    return str(getattr(owner, "__name__", None) or getattr(function, "__name__", function))


_TENSOR: Any = torch.Tensor
_DEVICE, _IS_META = _TENSOR.device.__get__, _TENSOR.is_meta.__get__
_HARMLESS = {getattr(_TENSOR, name) for name in _METHODS if hasattr(_TENSOR, name)}
_HARMLESS |= {getattr(_TENSOR, name).__get__ for name in _PROPERTIES if hasattr(_TENSOR, name)}
_HARMLESS |= {_TENSOR.requires_grad.__set__, _TENSOR.grad.__set__}
