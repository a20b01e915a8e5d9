"""The demo model's text: six clearly different kinds, fetched from Debian packages.

Each kind is a list of documents. A document is held out when the hash of its name says so
(one in sixteen), so training and held-out text never share a document and the split does
not depend on the order in which files are listed.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

HELD_OUT_ONE_IN = 16
DICTIONARY_DOCUMENT_CHARACTERS = 20_000

Document = tuple[str, str]  # name, text


def fetch(package: str, cache: Path) -> Path:
    """Download a Debian package with apt-get (no root needed), unpack it, return its folder."""
    folder = cache / package
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "-qq", package], cwd=cache, check=True)
        (archive,) = cache.glob(f"{package}_*.deb")
        partial = cache / f"{package}.partial"
        subprocess.run(["dpkg-deb", "-x", archive, partial], check=True)
        partial.rename(folder)
    return folder


def _compressed(path: Path) -> str:
    return gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")


def _bible(cache: Path) -> Iterator[Document]:
    program = fetch("bible-kjv", cache) / "usr/bin/bible"
    data = fetch("bible-kjv-text", cache) / "usr/lib"
    command: list[str | Path] = [program, "-p", data, "-f", "gen1:1-rev22:21"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    chapters: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.strip():
            chapters.setdefault(line.split(":", 1)[0].strip(), []).append(line.strip())
    for chapter, verses in chapters.items():
        yield chapter, "\n".join(verses)


def _dictionary(cache: Path) -> Iterator[Document]:
    text = _compressed(fetch("dict-gcide", cache) / "usr/share/dictd/gcide.dict.dz")
    for start in range(0, len(text), DICTIONARY_DOCUMENT_CHARACTERS):
        block = text[start : start + DICTIONARY_DOCUMENT_CHARACTERS]
        yield f"gcide-{start}", block[block.find("\n\n") + 2 :]


def _plain_roff(source: str) -> str:
    """Manual-page source reduced to its prose: no comments, requests or font escapes."""
    lines = []
    for line in source.splitlines():
        if line.startswith((".SH", ".SS")):
            lines.append("\n" + line[3:].strip(' "'))
        elif line.startswith((".B ", ".I ", ".BR ", ".IR ", ".BI ", ".RB ")):
            lines.append(line.split(" ", 1)[1].replace('"', ""))
        elif not line.startswith((".", "'")):
            lines.append(line)
    text = re.sub(r"\\f(\[\w*\]|\(..|.)", "", "\n".join(lines))
    text = text.replace(r"\(aq", "'").replace(r"\e", "\\")
    return re.sub(r"\\([-&. ])", lambda match: match[1].strip("&"), text)


def _manuals(language: str) -> Callable[[Path], Iterator[Document]]:
    def documents(cache: Path) -> Iterator[Document]:
        root = fetch(f"manpages-{language}", cache) / "usr/share/man"
        for path in sorted(root.rglob("*.gz")):
            if path.is_file():
                yield path.name, _plain_roff(_compressed(path))

    return documents


def _kernel(cache: Path) -> Iterator[Document]:
    root = fetch("linux-doc-6.1", cache) / "usr/share/doc/linux-doc-6.1/Documentation"
    for path in sorted(root.rglob("*.rst.gz")):
        if "translations" not in path.parts:
            yield str(path.relative_to(root)), _compressed(path)


def _python(cache: Path) -> Iterator[Document]:
    packages = (fetch(name, cache) for name in ("libpython3.11-stdlib", "libpython3.11-minimal"))
    for package in packages:
        root = package / "usr/lib/python3.11"
        for path in sorted(root.rglob("*.py")):
            if path.is_file():
                name = str(path.relative_to(root))
                yield name, path.read_text("utf-8", errors="replace")


KINDS: dict[str, Callable[[Path], Iterator[Document]]] = {
    "bible": _bible,
    "dictionary": _dictionary,
    "french-manual": _manuals("fr"),
    "german-manual": _manuals("de"),
    "kernel-docs": _kernel,
    "python": _python,
}


def load(cache: Path, *, held_out: bool) -> dict[str, list[str]]:
    """Documents of one side of the split, by kind, in a fixed order."""

    def in_split(kind: str, name: str) -> bool:
        digest = hashlib.sha256(f"{kind}/{name}".encode()).digest()
        return (digest[0] % HELD_OUT_ONE_IN == 0) is held_out

    return {
        kind: [t for name, t in documents(cache) if in_split(kind, name) and len(t) > 400]
        for kind, documents in KINDS.items()
    }
