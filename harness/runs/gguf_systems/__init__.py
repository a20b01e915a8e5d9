"""What can go on with a prompt from a GGUF file under a limit: one file each kind of system.

Each module here but `server_process` has `SYSTEMS`; `available()` lists them all. A program that is
not llama.cpp's own is named by an environment variable; without it the system is left out.
`user_engine.systems` makes others of commands that users name.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SERVER, BENCH = "own", "llama-bench"


@dataclass(frozen=True)
class Work:
    """One run: a prompt of token ids, then `new_tokens`, greedily, in a process of its own."""

    programs: Path  # the folder of a llama.cpp build's programs
    model: Path
    dense_bytes: int  # of the file, all but experts
    prompt: tuple[int, ...]
    new_tokens: int
    threads: int
    cap_bytes: int | None = None
    trace: Path | None = None  # where what is ours may record the run's routing

    @property
    def context_tokens(self) -> int:
        """Room for prompt and answer, in steps of 1,024 tokens."""
        return -(-(len(self.prompt) + self.new_tokens) // 1024) * 1024


@dataclass(frozen=True)
class System:
    """A system by the name that its rows bear.

    run: gives `outcome`, and where that is "ok" tokens_per_second, prompt_seconds and what else is
        known, such as `trace`, the file in which it recorded the run. clock: speeds are compared
        with those of the same clock only. usual: runs where nobody says which systems are to.
    """

    name: str
    run: Callable[[Work], dict[str, Any]]
    clock: str = SERVER
    is_ours: bool = False
    program: str = ""  # the environment variable that names it; "": of the build
    option: str = ""  # its help must tell of it; "": any such program does
    usual: bool = True
    may_fail: bool = False  # a failure is the outcome of a row, not the table's end

    def installed(self) -> bool:
        program = os.environ.get(self.program, "")
        if not self.program or not Path(program).is_file():
            return not self.program
        return not self.option or self.option in _help(program)


def _help(program: str) -> str:
    done = subprocess.run([program, "--help"], capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


def available() -> dict[str, System]:
    """Every system, installed or not, in the order of the modules' names."""
    modules = [
        importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)
    ]
    return {system.name: system for module in modules for system in getattr(module, "SYSTEMS", ())}
