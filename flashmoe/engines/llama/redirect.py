"""Points functions that a loaded library imports elsewhere, in its global offset table."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import numpy as np
from elftools.elf.elffile import ELFFile

from flashmoe.errors import FlashMoEError

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
# Rows of the tables of a library of 64 bits.
_SYMBOL = np.dtype([("name", "<u4"), ("rest", "V20")])
_RELOCATION = np.dtype([("offset", "<u8"), ("kind", "<u4"), ("symbol", "<u4"), ("addend", "<i8")])


def loaded(part: str) -> Path | None:
    """The file of a library in this process whose path contains `part`."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line[73:].strip()
        if part in path:
            return Path(path).resolve()
    return None


def redirect(library: Path, functions: dict[str, int]) -> set[str]:
    """Let calls of `functions` (address by name) that `library` makes go to those addresses.

    Returns the names that the library imports, all of which are redirected now. Raises
    FlashMoEError where its table cannot be written to.
    """
    base = _base_of(library)
    redirected = set()
    for name, offset in _imports(library):
        if name in functions:
            _write(base + offset, functions[name])
            redirected.add(name)
    return redirected


def _base_of(library: Path) -> int:
    """Where the library's first byte would lie."""
    starts = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and Path(fields[5]).resolve() == library:
            starts.append(int(fields[0].split("-")[0], 16) - int(fields[2], 16))
    return min(starts)


def _imports(library: Path) -> list[tuple[str, int]]:
    """(name, offset of its cell) of every function or object that the library imports.

    The tables are read as arrays: they have thousands of rows, of which few name a symbol.
    """
    found = []
    with open(library, "rb") as file:
        elf = ELFFile(file)
        symbols = elf.get_section_by_name(".dynsym")
        first_bytes = np.frombuffer(symbols.data(), _SYMBOL)["name"]
        names = elf.get_section(symbols["sh_link"]).data()
        for section in (".rela.plt", ".rela.dyn"):
            if rows := elf.get_section_by_name(section):
                table = np.frombuffer(rows.data(), _RELOCATION)
                for number, offset in table[table["symbol"] > 0][["symbol", "offset"]].tolist():
                    start = first_bytes[number]
                    found.append((names[start : names.index(b"\0", start)].decode(), offset))
    return found


def _write(cell: int, address: int) -> None:
    page = cell // mmap.PAGESIZE * mmap.PAGESIZE  # the loader made it read-only after start
    if _libc.mprotect(page, 2 * mmap.PAGESIZE, _READ_WRITE):
        raise FlashMoEError("the program's table of imported functions cannot be written to here")
    ctypes.c_void_p.from_address(cell).value = address
