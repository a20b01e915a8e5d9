"""The project's modules and what each imports, read from the source; nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("flashmoe", "baselines", "harness")


@cache
def modules() -> dict[str, Path]:
    """Every module of the project, by its dotted name."""
    return {_name(path): path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}


@cache
def imports(module: str) -> tuple[str, ...]:
    """What a module imports anywhere: at its head, in functions, and for the type checker only.

    `from a import b` is the module `a.b` where there is one, and else `a`.
    """
    targets: list[str] = []
    for node in ast.walk(ast.parse(modules()[module].read_text())):
        if isinstance(node, ast.Import):
            targets += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            inner = (f"{node.module}.{alias.name}" for alias in node.names)
            targets += [name if name in modules() else str(node.module) for name in inner]
    return tuple(targets)


def names_from(module: str, source: str) -> set[str]:
    """The names that a module takes by `from source import ...`."""
    return {
        alias.name
        for node in ast.walk(ast.parse(modules()[module].read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == source
        for alias in node.names
    }


def within(module: str, packages: Iterable[str]) -> bool:
    """Is it one of these packages, or inside one?"""
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
