"""Joins a model and a store: `load` returns a transformers model whose experts stream."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import torch
import transformers

from flashmoe import dense, experts, policies, skeleton
from flashmoe.arena import Arena
from flashmoe.cache import ExpertCache
from flashmoe.errors import FlashMoEError
from flashmoe.locations import cache_folder
from flashmoe.lookahead import Lookahead
from flashmoe.policies.base import Scope
from flashmoe.prefetch import PAYS_FROM_BYTES, Prefetcher
from flashmoe.sizes import format_bytes, parse_bytes
from flashmoe.store import manifest as manifests
from flashmoe.store.pack import pack
from flashmoe.store.reader import ExtentReader
from flashmoe.store.verify import open_manifest

logger = logging.getLogger(__name__)

SPARES = 4  # slots for guesses: of OLMoE's size the drive fills one to two while a layer computes


class Engine:
    """What `model.flashmoe` is: the caches of a loaded model, their counts and their end."""

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        store: Path,
        memory_bytes: int,
        policy: str,
        prefetch: bool,
    ) -> None:
        self.store = store
        self.manifest = open_manifest(store)
        self.memory_bytes = memory_bytes
        self.policy_name = policy
        self.policy = policies.get(policy, online=True)
        self.modules = skeleton.expert_modules(model)
        _check_fit(self.modules, self.manifest, store)
        self.slots, spares = slots_and_spares(self.manifest, memory_bytes, prefetch)
        self.timings = experts.Timings()
        self.routing = experts.Routing(self.manifest.top_k, len(self.manifest.layers))
        self.reader = ExtentReader(store, self.manifest)
        self.layers = []
        for number, (spec, module) in enumerate(
            zip(self.manifest.layers, self.modules.values(), strict=True)
        ):
            arena = Arena(spec, min(self.slots, spec.n_experts))
            streamed = experts.StreamedExperts(
                number, arena, self._new_cache(number), self.reader, self.timings, self.routing
            )
            module.flashmoe_experts = streamed  # type: ignore[assignment]
            self.layers.append(streamed)
        self.prefetcher: Prefetcher | None = None
        if spares:
            arena = Arena(self.manifest.layers[0], spares)
            self.prefetcher = Prefetcher(Lookahead(model), arena, self.reader)
            for layer, above in zip(self.layers, [*self.layers[1:], None], strict=True):
                layer.prefetcher, layer.above = self.prefetcher, above
        self._peak_resident_bytes = 0

    def _new_cache(self, number: int) -> ExpertCache:
        n_experts = self.manifest.layers[number].n_experts
        scope = Scope(n_experts, self.manifest.top_k, 1, number, len(self.manifest.layers))
        return ExpertCache(self.policy(scope, min(self.slots, n_experts)))

    @property
    def resident_bytes(self) -> int:
        """Bytes of experts in slots now, spare slots included. Never above the budget."""
        spares = self.prefetcher.spares if self.prefetcher else None
        return (spares.n_slots * spares.extent_bytes if spares else 0) + sum(
            len(layer.cache.resident) * layer.arena.extent_bytes for layer in self.layers
        )

    def stats(self) -> dict[str, Any]:
        """Counts since load or the last reset, in experts, bytes and seconds.

        `requests` counts distinct (forward step, layer, expert); `hits` those resident when
        the step reached the layer; `prefetch_used` those misses that a guess had begun to
        read, `prefetch_wasted` the guesses begun in vain. `read_seconds` is time with a read
        in flight, `wait_seconds` the part of it in which the model stood still.
        """
        caches = [layer.cache for layer in self.layers]
        resident, guesses = self.resident_bytes, self.prefetcher
        self._peak_resident_bytes = max(self._peak_resident_bytes, resident)
        requests = sum(cache.requests for cache in caches)
        hits = sum(cache.hits for cache in caches)
        return {
            "policy": self.policy_name,
            "slots_per_layer": self.slots,
            "requests": requests,
            "hits": hits,
            "misses": requests - hits,
            "hit_rate": hits / requests if requests else 0.0,
            "prefetch_used": guesses.used if guesses else 0,
            "prefetch_wasted": guesses.wasted if guesses else 0,
            "prefetch_wasted_bytes": guesses.wasted_bytes if guesses else 0,
            "bytes_read": self.reader.bytes_read,
            "read_seconds": self.reader.busy_seconds,
            "wait_seconds": self.timings.wait_seconds,
            "compute_seconds": self.timings.compute_seconds,
            "experts_seconds": self.timings.total_seconds,
            "policy_seconds": sum(cache.policy_seconds for cache in caches),
            "resident_bytes": resident,
            "peak_resident_bytes": self._peak_resident_bytes,
            "memory_bytes": self.memory_bytes,
            "direct_io": self.reader.direct,
        }

    def reset(self) -> None:
        """Start cold: empty slots, fresh policies, counts at zero. Not during generation."""
        if self.prefetcher:
            self.prefetcher.clear()
        for number, layer in enumerate(self.layers):
            layer.cache = self._new_cache(number)
        self.reset_counts()

    def reset_counts(self) -> None:
        """Counts at zero; residency and the policies' statistics stay as they are."""
        for layer in self.layers:
            layer.cache.requests = layer.cache.hits = 0
            layer.cache.policy_seconds = 0.0
        self.timings.total_seconds = self.timings.wait_seconds = 0.0
        self.timings.compute_seconds = 0.0
        self.reader.reset_counts()
        if self.prefetcher:
            self.prefetcher.reset_counts()
        self._peak_resident_bytes = 0

    def close(self) -> None:
        """Free slots, threads and the store's descriptor. The model cannot run afterwards."""
        self.reader.close()
        for module in self.modules.values():
            if hasattr(module, "flashmoe_experts"):
                del module.flashmoe_experts
        for layer in self.layers:
            layer.arena.close()
        self.layers.clear()
        if self.prefetcher:
            self.prefetcher.close()
            self.prefetcher = None


def slots_per_layer(manifest: manifests.Manifest, memory_bytes: int) -> int:
    """Whole slots that every layer gets from the budget.

    Raises FlashMoEError when that is fewer than one token needs at a layer.
    """
    one_each = sum(layer.extent_bytes for layer in manifest.layers)
    slots = memory_bytes // one_each
    if slots < manifest.top_k:
        least = one_each * manifest.top_k
        raise FlashMoEError(
            f"memory={format_bytes(memory_bytes)} is too small: a token uses {manifest.top_k} "
            f"experts at each of {len(manifest.layers)} layers, which takes "
            f"{format_bytes(least)} ({least} bytes) at least"
        )
    return int(min(slots, max(layer.n_experts for layer in manifest.layers)))


def slots_and_spares(
    manifest: manifests.Manifest, memory_bytes: int, prefetch: bool
) -> tuple[int, int]:
    """Slots of every layer, and spare slots for guesses, which come out of the same budget.

    What is left of the budget after whole slots for every layer is spare. Only a budget that
    leaves nothing gives up a slot a layer for guesses. None where guesses do not pay, or no
    layer can miss.
    """
    slots = slots_per_layer(manifest, memory_bytes)
    first = manifest.layers[0]
    alike = all(layer.tensors == first.tensors for layer in manifest.layers)
    can_miss = slots < max(layer.n_experts for layer in manifest.layers)
    if not (prefetch and alike and can_miss and first.extent_bytes >= PAYS_FROM_BYTES):
        return slots, 0
    one_each = sum(layer.extent_bytes for layer in manifest.layers)
    left = memory_bytes - slots * one_each
    if left < first.extent_bytes and slots > manifest.top_k:
        slots, left = slots - 1, left + one_each
    return slots, min(SPARES, left // first.extent_bytes)


def _check_fit(
    modules: dict[str, torch.nn.Module], manifest: manifests.Manifest, store: Path
) -> None:
    wanted = {
        name: {n: tuple(p.shape) for n, p in skeleton.expert_parameters(module).items()}
        for name, module in modules.items()
    }
    held = {
        layer.module: {t.name: (layer.n_experts, *t.shape) for t in layer.tensors}
        for layer in manifest.layers
    }
    if wanted != held:
        differing = sorted(set(wanted) ^ set(held)) or [n for n in wanted if wanted[n] != held[n]]
        raise FlashMoEError(
            f"store {store} is of another model (its experts differ at {differing[0]}); "
            "pack it again with `flashmoe pack`"
        )


def load(
    path: str | os.PathLike[str],
    *,
    memory: int | str,
    policy: str = "learned",
    device: str = "cpu",
    prefetch: bool = True,
) -> transformers.PreTrainedModel:
    """A transformers model, ready for `.generate`, whose experts stay on the SSD.

    path: a store, or a Hugging Face directory, which is packed into the user's cache
        directory the first time (see `store_for`).
    memory: bytes, or a size such as "4GiB", that experts may occupy; the rest of the model
        (5-7 % of it) comes on top. Output does not depend on it.
    policy: a name from `flashmoe policies`, or name:argument.
    prefetch: while a layer computes, read what the next one is guessed to need (where that
        pays: experts of a MiB or more). Output does not depend on it either.
    Raises FlashMoEError when the path is no usable MoE model or store, or the budget is too
    small for one token. `model.flashmoe` is the Engine.
    """
    if torch.device(device).type != "cpu":
        raise FlashMoEError(f"device {device!r}: this version computes on the CPU only")
    memory_bytes = parse_bytes(memory)
    store = store_for(Path(path))
    model = skeleton.build(skeleton.read_config(store))
    engine = Engine(model, store, memory_bytes, policy, prefetch)
    try:
        dense.fill(model, store, engine.manifest)
    except BaseException:
        engine.close()
        raise
    model.flashmoe = engine  # type: ignore[assignment]
    model.name_or_path = str(path)
    return model


def store_for(path: Path) -> Path:
    """`path` if it is a store; else the store packed from it, made on first use.

    Stores made here live under $XDG_CACHE_HOME/flashmoe (default ~/.cache/flashmoe), named
    after the checkpoint and a digest of its files' sizes and times.
    """
    if manifests.is_store(path):
        return path
    if not path.is_dir():
        raise FlashMoEError(f"{path}: no such directory; give a Hugging Face model or a store")
    stamp = [str(path.resolve())]
    for file in sorted([*path.glob("*.safetensors"), *path.glob("*.json")]):
        stat = file.stat()
        stamp.append(f"{file.name} {stat.st_size} {stat.st_mtime_ns}")
    digest = hashlib.sha256("\n".join(stamp).encode()).hexdigest()[:12]
    store = cache_folder() / f"{path.resolve().name}-{digest}"
    if not manifests.is_store(store):
        logger.warning("packing %s into %s (once)", path, store)
        pack(path, store)
    return store
