"""Random access to safetensors shards: any rows of any tensor, without mapping the file.

safetensors' own `get_slice` serves neither way: its pread backend reads the whole tensor for one
row, and its mmap backend counts every page as this process's.
"""

from __future__ import annotations

import json
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flashmoe.disk.direct_io import drop_page_cache, open_file
from flashmoe.errors import FlashMoEError

SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
SAFETENSORS_CODES = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}
_MAX_HEADER_BYTES = 100 << 20  # safetensors' own limit


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset_bytes: int
    size_bytes: int


class FileRange(NamedTuple):
    """Some bytes of a file."""

    file: Path
    offset_bytes: int
    size_bytes: int


def header(tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    """The first bytes of a safetensors file that holds `tensors` one after the other."""
    entries, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": SAFETENSORS_CODES[dtype],
            "shape": list(shape),
            "data_offsets": [end, end + size],
        }
        end += size
    encoded = json.dumps(entries).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


class Shard:
    """One open safetensors file.

    Raises FlashMoEError when the file is missing, cut short, or its header makes no sense.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = open_file(path, os.O_RDONLY)
        except FileNotFoundError:
            raise FlashMoEError(
                f"{path.parent}: shard {path.name} is missing; fetch the checkpoint again"
            ) from None
        except OSError as error:
            raise FlashMoEError(f"{path} cannot be opened ({error.strerror})") from None
        try:
            if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
                raise ValueError("it is no file")
            self.tensors = self._read_header()
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            self.close()
            raise FlashMoEError(
                f"{path} is cut short or damaged ({error}); fetch the checkpoint again"
            ) from None
        except FlashMoEError:
            self.close()
            raise

    def _read_header(self) -> dict[str, TensorEntry]:
        file_bytes = os.fstat(self._descriptor).st_size
        length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        if not 2 <= length <= min(file_bytes - 8, _MAX_HEADER_BYTES):
            raise ValueError("no safetensors header")
        entries: dict[str, Any] = json.loads(os.pread(self._descriptor, length, 8))
        tensors = {}
        for name, entry in entries.items():
            if name == "__metadata__":
                continue
            if (code := entry["dtype"]) not in SAFETENSORS_DTYPES:
                raise FlashMoEError(
                    f"{self.path}: tensor {name} has the dtype {code}, which FlashMoE cannot "
                    "stream: use the checkpoint's float16, bfloat16 or float32 version"
                )
            dtype, shape = SAFETENSORS_DTYPES[code], tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            size = math.prod(shape) * dtype.itemsize
            if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)):
                raise ValueError(f"tensor {name} has a negative or fractional size")
            if end - begin != size:
                raise ValueError(f"tensor {name} takes {size} bytes, its offsets say {end - begin}")
            if 8 + length + end > file_bytes:
                raise ValueError(
                    f"tensor {name} ends {8 + length + end - file_bytes} bytes after the file"
                )
            tensors[name] = TensorEntry(dtype, shape, 8 + length + begin, size)
        return tensors

    def place(self, name: str, row: int | None = None) -> FileRange:
        """Where a tensor lies, or one row of it along the first dimension."""
        entry = self.tensors[name]
        if row is None:
            return FileRange(self.path, entry.offset_bytes, entry.size_bytes)
        size = entry.size_bytes // entry.shape[0]
        return FileRange(self.path, entry.offset_bytes + row * size, size)

    def read(self, name: str, row: int | None = None) -> torch.Tensor:
        """A whole tensor, or with `row` its slice [row : row + 1] along the first dimension.

        torch's own allocator aligns it, to 64 bytes, because on AMD processors the last bits of a
        matrix product depend on where the weights lie.
        """
        entry = self.tensors[name]
        shape = entry.shape if row is None else (1, *entry.shape[1:])
        return self.bytes_at(self.place(name, row)).view(entry.dtype).view(shape)

    def bytes_at(self, place: FileRange) -> torch.Tensor:
        """What lies there, uint8 [size_bytes]."""
        data = torch.empty(place.size_bytes, dtype=torch.uint8)
        view, done = memoryview(data.numpy()), 0  # type: ignore[arg-type]
        while done < place.size_bytes:
            try:
                count = os.preadv(self._descriptor, [view[done:]], place.offset_bytes + done)
            except OSError as error:
                raise FlashMoEError(f"{self.path}: reading failed ({error})") from None
            if not count:
                raise FlashMoEError(f"{self.path} ends within a tensor: it was cut short")
            done += count
        return data

    def forget_pages(self) -> None:
        """Let the kernel drop this file's pages, so that a pack does not fill the page cache."""
        drop_page_cache(self._descriptor)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
