"""Where a figure comes from: machine, drive, commit, versions, seed, date."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from harness.runs.ssd import fio_path

_PACKAGES = ("torch", "transformers", "safetensors", "numpy", "pandas", "tokenizers")

_ALL_BUT_RESULTS = (":(top)", ":(top,exclude)results")  # wherever git is called from


def gather(command: str, folder: Path, **more: Any) -> dict[str, Any]:
    """Everything that a reader needs to judge or repeat the figures in `folder`'s run."""
    fio = fio_path()
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "machine": {
            "cpu": cpu_name(),
            "cores": psutil.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "kernel": platform.release(),
            "file_system": mount_of(folder)[0],
            "vector_instructions": torch.backends.cpu.get_cpu_capability(),
            "bf16_instructions": sorted(flags() & {"avx512_bf16", "amx_bf16"}),
        },
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(
            _git("status", "--porcelain", "--untracked-files=no", "--", *_ALL_BUT_RESULTS)
        ),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _PACKAGES},
        "fio": _output_of([fio, "--version"]) if fio else None,
    } | more


def machine_slug() -> str:
    """A folder name for this machine: processor, its vectors (as torch sees them), cores, memory.

    Virtual processors of one name may be of two kinds: with AVX-512 torch multiplies bf16 by
    other kernels than without.
    """
    memory = round(psutil.virtual_memory().total / 2**30)
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"{slug(cpu_name())}-{vectors.lower()}-{psutil.cpu_count()}-core-{memory}gib"


def slug(cpu: str) -> str:
    """A processor's name as it stands in names of files: without marks, clock and what is plain."""
    words = re.sub(r"\(.*?\)|CPU|Processor|@.*", " ", cpu).lower()
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-")


def cpu_name() -> str:
    match = re.search(r"model name\s*:\s*(.+)", _cpuinfo())
    return match[1] if match else platform.processor() or platform.machine()


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def flags() -> set[str]:
    """What the processor can, in the kernel's words."""
    match = re.search(r"(?:flags|Features)\s*:\s*(.+)", _cpuinfo())
    return set(match[1].split()) if match else set()


def mount_of(folder: Path) -> tuple[str, str]:
    """The file system that holds `folder`, and its device."""
    best = max(
        (p for p in psutil.disk_partitions(all=True) if _holds(p.mountpoint, folder)),
        key=lambda p: len(p.mountpoint),
        default=None,
    )
    return (best.fstype, best.device) if best else ("unknown", "unknown")


def _holds(mountpoint: str, folder: Path) -> bool:
    return os.path.commonpath([mountpoint, folder.resolve()]) == mountpoint


def _git(*arguments: str) -> str | None:
    return _output_of(["git", *arguments])


def _output_of(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
