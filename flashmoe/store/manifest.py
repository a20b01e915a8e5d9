"""The store's table of contents: geometry, dtypes, offsets and a checksum for each expert."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmoe import quant
from flashmoe.disk import files
from flashmoe.disk.direct_io import ALIGNMENT_BYTES
from flashmoe.errors import FlashMoEError
from flashmoe.quant import NONE
from flashmoe.store.shares import Shares

if TYPE_CHECKING:  # an engine without torch uses this room too
    import torch

FORMAT, VERSION = "flashmoe-store", 1
FILE_NAME = "manifest.json"
_MAX_NAME_LENGTH = 200  # characters
TENSOR_ALIGNMENT_BYTES = 64  # a cache line, which every dtype and matrix kernel accepts
_MAX_MANIFEST_BYTES = 256 << 20
MOST_SHARES = 64
_KINDS = {
    "top_k": int, "dense_bytes": int, "architecture": str, "config_sha256": str,
    "experts_file": str, "dense_file": str, "quantisation": str, "layout": str, "dtype": str,
    "shares": int, "share": int, "folders_file": str,
}  # fmt: skip
# Of one element, by dtype: what a store can hold.
DTYPE_BYTES = {
    "float32": 4, "bfloat16": 2, "float16": 2, "int32": 4, "int8": 1, "uint8": 1,
    "float8_e4m3fn": 1, "float8_e8m0fnu": 1,
}  # fmt: skip


@dataclass(frozen=True)
class TensorSpec:
    """Where one parameter of an expert lies in the expert's extent."""

    name: str
    dtype: str  # a key of DTYPE_BYTES
    shape: tuple[int, ...]  # without the expert dimension
    offset_bytes: int  # from the extent's beginning

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class LayerSpec:
    """One MoE layer: `n_experts` extents of equal size, one after the other."""

    module: str  # its name in the model
    n_experts: int
    offset_bytes: int  # of the first extent, in the experts' file
    extent_bytes: int
    tensors: tuple[TensorSpec, ...]
    checksums: tuple[str, ...] = ()  # xxh3-64 of each whole extent, 16 hex digits
    quantisation: str = NONE  # unless none, a weight's parts are tensors called weight/part

    def extent_offset(self, expert: int) -> int:
        return self.offset_bytes + expert * self.extent_bytes

    @property
    def end_bytes(self) -> int:
        return self.extent_offset(self.n_experts)

    def shapes(self, *, transposed: bool) -> dict[str, tuple[int, ...]]:
        """Shapes of an expert's parameters in its module; `transposed`: weights are [in, out]."""
        plain, parts = quant.by_weight({tensor.name: tensor.shape for tensor in self.tensors})
        if (scheme := quant.get(self.quantisation)) is None:
            return plain
        weights = {name: scheme.shape(shapes) for name, shapes in parts.items()}
        return plain | {n: s[::-1] if transposed else s for n, s in weights.items()}


@dataclass(frozen=True)
class Manifest:
    """What a store holds. File names are relative to the store's directory."""

    architecture: str
    config_sha256: str
    top_k: int
    experts_file: str
    dense_file: str
    dense_bytes: int
    layers: tuple[LayerSpec, ...]
    quantisation: str = NONE
    layout: str = ""  # names the order of the scheme's bytes where that differs between machines
    dtype: str = ""  # in which the model computes; "": the one in config.json (older stores)
    shares: int = 1  # files among which each extent is shared; all but the first lie elsewhere
    share: int = 0  # the one that lies here; only the first has the rest of the model beside it
    folders_file: str = ""  # names the other folders with experts; "": there are none

    @property
    def experts_bytes(self) -> int:
        return max(layer.end_bytes for layer in self.layers)

    @property
    def first_experts(self) -> list[int]:
        """[layers + 1]: each layer's expert 0 where experts are numbered through all layers."""
        return [0, *itertools.accumulate(layer.n_experts for layer in self.layers)]

    def share_file(self, share: int) -> str:
        """The name of a share's file in its folder, by the name of the first."""
        name = Path(self.experts_file)
        return f"{name.stem}-{share}{name.suffix}" if share else self.experts_file

    def save(self, directory: Path) -> None:
        """Publish the store: an atomic rename, after which the old files are unreferenced.

        Raises FlashMoEError when the directory cannot be written to.
        """
        document = {"format": FORMAT, "version": VERSION} | asdict(self)
        content = json.dumps(document, indent=1).encode()
        files.replace(directory / FILE_NAME, lambda file: file.write(content))


def lay_out(
    module: str,
    n_experts: int,
    offset_bytes: int,
    tensors: list[tuple[str, str, Any]],
    quantisation: str = NONE,
) -> LayerSpec:
    """The layer whose experts have these parameters (name, dtype, shape), in this order.

    Raises FlashMoEError for a dtype that a store cannot hold.
    """
    specs, end = [], 0
    for name, dtype, shape in tensors:
        if dtype not in DTYPE_BYTES:
            raise FlashMoEError(
                f"{module}.{name} is {dtype}: a store holds {', '.join(DTYPE_BYTES)}"
            )
        spec = TensorSpec(name, dtype, tuple(shape), round_up(end, TENSOR_ALIGNMENT_BYTES))
        specs.append(spec)
        end = spec.offset_bytes + spec.size_bytes
    extent_bytes = round_up(end, ALIGNMENT_BYTES)
    return LayerSpec(module, n_experts, offset_bytes, extent_bytes, tuple(specs), (), quantisation)


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as manifests and messages write it: bfloat16."""
    return str(dtype).removeprefix("torch.")


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def is_store(directory: Path) -> bool:
    """Does the directory hold a manifest, good or damaged, that no other program wrote?"""
    path = directory / FILE_NAME
    if not path.is_file():
        return False
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return True
    return not isinstance(document, dict) or "format" in document


def load(directory: Path) -> Manifest:
    """Read and check the manifest of a store, which may come from anywhere.

    Raises FlashMoEError when it is torn, foreign, of another version, inconsistent in itself,
    or does not fit the size of the files it names.
    """
    path = directory / FILE_NAME

    def refuse(what: str) -> FlashMoEError:
        return FlashMoEError(f"store {directory}: {what}; pack it again with `flashmoe pack`")

    try:
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise refuse(f"{FILE_NAME} is too large to be a manifest")
        document = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise FlashMoEError(f"{directory} is not a store: it has no {FILE_NAME}") from None
    except (ValueError, RecursionError, OSError) as error:
        raise refuse(f"{FILE_NAME} cannot be read ({error})") from None
    if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
        raise refuse(f"{FILE_NAME} is not a FlashMoE manifest")
    if (version := document.pop("version", None)) != VERSION:
        raise refuse(f"format version {version!r} is not {VERSION}, the one this FlashMoE reads")
    try:
        manifest = _parse(document)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise refuse(f"{FILE_NAME} is damaged ({type(error).__name__}: {error})") from None
    if manifest.share:
        raise FlashMoEError(
            f"{directory} holds share {manifest.share + 1} of {manifest.shares} of a store's "
            "experts: name the store's own folder, the first that it was packed into"
        )
    scheme = quant.get(manifest.quantisation)
    if scheme and scheme.layout() != manifest.layout:
        raise refuse(f"its {manifest.quantisation} weights are packed for another processor")
    for name in (manifest.experts_file, manifest.dense_file, manifest.folders_file or "-"):
        if not files.is_inside(name, subfolders=False) or len(name) > _MAX_NAME_LENGTH:
            raise refuse(f"{FILE_NAME} names a file outside the store ({name!r})")
    for name, expected in (
        (manifest.experts_file, Shares(manifest.layers, manifest.shares).file_bytes(0)),
        (manifest.dense_file, manifest.dense_bytes),
    ):
        file = directory / name
        if not file.is_file():
            raise refuse(f"its file {name} is missing")
        if file.stat().st_size != expected:
            raise refuse(
                f"{name} has {file.stat().st_size} bytes, the manifest says {expected}: "
                "it was cut short or belongs to another store"
            )
    return manifest


def _parse(document: dict[str, Any]) -> Manifest:
    layers = []
    end = 0
    for entry in document.pop("layers"):
        tensors = [TensorSpec(**t | {"shape": tuple(t["shape"])}) for t in entry.pop("tensors")]
        layer = LayerSpec(
            **entry | {"tensors": tuple(tensors), "checksums": tuple(entry["checksums"])}
        )
        if any(tensor.dtype not in DTYPE_BYTES for tensor in tensors):
            raise ValueError(f"dtypes of {layer.module}")
        expected = lay_out(
            layer.module,
            layer.n_experts,
            layer.offset_bytes,
            [(t.name, t.dtype, t.shape) for t in tensors],
        )
        if expected.tensors != layer.tensors or expected.extent_bytes != layer.extent_bytes:
            raise ValueError(f"offsets of {layer.module} are not those of its tensors")
        if layer.offset_bytes != end or not 0 < layer.n_experts <= 1 << 20:
            raise ValueError(f"{layer.module} overlaps its neighbour or has a gap before it")
        if len(layer.checksums) != layer.n_experts:
            raise ValueError(f"{layer.module} has {len(layer.checksums)} checksums")
        if not tensors or any(not 0 < n <= 1 << 32 for t in tensors for n in t.shape):
            raise ValueError(f"shapes of {layer.module}")
        end = layer.end_bytes
        layers.append(layer)
    if not layers:
        raise ValueError("no layers")
    manifest = Manifest(**document | {"layers": tuple(layers)})
    for name, kind in _KINDS.items():
        if type(getattr(manifest, name)) is not kind:
            raise TypeError(f"{name} must be {kind.__name__}")
    for layer in layers:
        numbers = [layer.n_experts, layer.offset_bytes, layer.extent_bytes]
        numbers += [n for tensor in layer.tensors for n in (*tensor.shape, tensor.offset_bytes)]
        names = [layer.module, *layer.checksums, *(tensor.name for tensor in layer.tensors)]
        if {type(n) for n in numbers} != {int} or {type(n) for n in names} != {str}:
            raise TypeError("numbers must be integers, names strings")
    if not 0 <= manifest.share < manifest.shares <= MOST_SHARES:
        raise ValueError(f"share {manifest.share} of {manifest.shares}")
    if manifest.dtype not in ("", *DTYPE_BYTES):
        raise ValueError(f"dtype {manifest.dtype!r}")
    if {layer.quantisation for layer in layers} != {manifest.quantisation}:
        raise ValueError("layers differ in quantisation")
    scheme = quant.get(manifest.quantisation)
    if isinstance(scheme, quant.Published):
        for layer in layers:
            _check_parts(layer, scheme)
    return manifest


def _check_parts(layer: LayerSpec, format: quant.Published) -> None:
    """Raises ValueError unless a layer's parts are such that machine code may multiply by them."""
    import torch

    kinds = {t.name: (getattr(torch, t.dtype), t.shape) for t in layer.tensors}
    for name, parts in quant.by_weight(kinds)[1].items():
        if not format.fits(parts):
            raise ValueError(f"parts of {layer.module}.{name} are not those of {format.name}")
