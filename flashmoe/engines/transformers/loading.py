"""Loads a model: its dense weights into memory, its experts left on the SSD under an engine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from flashmoe import quant
from flashmoe.engines.transformers.arithmetic import ARITHMETIC, EXACT, FAST
from flashmoe.engines.transformers.checkpoints import backends
from flashmoe.engines.transformers.checkpoints.backends import ModelBackend
from flashmoe.engines.transformers.engine import TransformersEngine
from flashmoe.engines.transformers.experts.mixture import most_waiting_bytes
from flashmoe.engines.transformers.model import dense_weights, moe_modules, streamed_model
from flashmoe.errors import FlashMoEError
from flashmoe.memory import free_memory
from flashmoe.residency import budget
from flashmoe.util.sizes import parse_bytes


def load(
    path: str | os.PathLike[str],
    *,
    memory: int | str,
    policy: str = "learned",
    device: str = "cpu",
    prefetch: bool = True,
    check_reads: bool = False,
    arithmetic: str = EXACT,
    also: Sequence[str | os.PathLike[str]] = (),
) -> transformers.PreTrainedModel:
    """A transformers model, ready for `.generate`, whose experts stay on the SSD.

    path: a store, or a Hugging Face directory, whose experts are read in place.
    memory: bytes, or a size such as "4GiB", that experts may occupy; the rest of the model
        (5-7 % of it) comes on top. "auto": what machine and cgroup have free, less a reserve
        (see `free_memory`); it shrinks and grows as that does, but on an accelerator it stays what
        it was at load. Output does not depend on it.
    policy: a name from `flashmoe policies`, or name:argument.
    device: where the model computes: "cpu", or an accelerator that torch knows, such as "cuda".
        There `memory` is the accelerator's; reads pass through 2 MiB of pinned DRAM a thread.
    prefetch: while a layer computes, read what the next one is guessed to need (where that
        pays: experts of a MiB or more). Output does not depend on it either.
    check_reads: compare every read with its checksum, not only the first of each expert: for
        drives that are not trusted, where cores are idle (see docs/speed.md#checksums).
    arithmetic: "exact" gives transformers' own output to the last bit. "fast" multiplies by
        bfloat16 weights in the way that is the fastest on this machine, and a few tokens, such
        as one that is decoded, by weights that were published quantised as they lie; it adds in
        float32. It too gives the same bits at every budget. `stats()["kernels"]` says how.
    also: folders, on other drives, that hold a copy of the store, besides those that it was packed
        into; reads are spread over all (see docs/drives.md).
    Raises FlashMoEError when the path is no usable MoE model or store, the budget is too small
    for one token, or there is no such device. `model.flashmoe` is the engine.
    """
    if arithmetic not in ARITHMETIC:
        raise FlashMoEError(
            f"arithmetic {arithmetic!r} is not known: choose from {', '.join(ARITHMETIC)}"
        )
    torch_device = _find_device(device)
    memory_is_auto = memory == "auto"
    memory_bytes = 0 if memory_is_auto else parse_bytes(memory)
    backend = backends.open_path(Path(path), [Path(folder) for folder in also])
    try:
        model = backend.build()
        _check_fit(model, backend)
        _check_kernels(backend, torch_device)
        if memory_is_auto:
            contents = backend.manifest
            beside_bytes = contents.dense_bytes + most_waiting_bytes(model)
            least_bytes = budget.least_bytes(contents)
            memory_bytes = free_memory.budget_bytes(beside_bytes, str(torch_device), least_bytes)
        engine = TransformersEngine(
            model,
            backend,
            memory_bytes,
            policy,
            device=torch_device,
            prefetch=prefetch,
            check_reads=check_reads,
            arithmetic=arithmetic,
        )
    except BaseException:
        backend.close()
        raise
    try:
        dense_weights.fill(
            model, backend.dense(), backend.path, backend.remedy, torch_device,
            fast=arithmetic == FAST and torch_device.type == "cpu",
        )  # fmt: skip
    except BaseException:
        engine.close()
        raise
    model.flashmoe = engine  # type: ignore[assignment]
    model.name_or_path = str(path)
    streamed_model.protect(model)
    if memory_is_auto:
        engine.follow()
    return model


def _find_device(device: str) -> torch.device:
    """torch's device of that name; raises FlashMoEError when it knows or sees none here."""
    try:
        torch_device = torch.device(device)
        module = torch.get_device_module(torch_device)
        usable = module.is_available() and (torch_device.index or 0) < module.device_count()
        usable = usable and hasattr(module, "Stream")  # Apple's has none yet
    except (RuntimeError, AttributeError):
        usable = False
    if not usable:
        raise FlashMoEError(
            f"device {device!r}: torch {torch.__version__} sees no such device on this machine: "
            'use device="cpu", or install the build of torch for your accelerator'
        )
    return torch_device


def _check_kernels(backend: ModelBackend, device: torch.device) -> None:
    """Raises FlashMoEError when the store's quantised weights cannot be multiplied on `device`."""
    scheme = quant.get(backend.manifest.layers[0].quantisation)
    if scheme and scheme.device_types and device.type not in scheme.device_types:
        raise FlashMoEError(
            f"store {backend.path}: its {scheme.name} weights can be multiplied on "
            f"{' and '.join(scheme.device_types)} only: use that device, or pack without --quant"
        )


def _check_fit(model: transformers.PreTrainedModel, backend: ModelBackend) -> None:
    """Raises FlashMoEError when the experts on disk are not of the shapes that the model has."""
    modules = moe_modules.expert_modules(model)
    in_model = {
        name: {n: tuple(p.shape) for n, p in moe_modules.expert_parameters(module).items()}
        for name, module in modules.items()
    }
    transposed = {name for name, module in modules.items() if module.is_transposed}
    on_disk = {
        layer.module: {
            name: (layer.n_experts, *shape)
            for name, shape in layer.shapes(transposed=layer.module in transposed).items()
        }
        for layer in backend.manifest.layers
    }
    if in_model != on_disk:
        differences = sorted(in_model.keys() ^ on_disk.keys())
        differences += [n for n in in_model if n in on_disk and in_model[n] != on_disk[n]]
        raise FlashMoEError(
            f"store {backend.path} is of another model (its experts differ at {differences[0]}); "
            "pack it again with `flashmoe pack`"
        )
