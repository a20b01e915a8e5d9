"""Who may import whom: imports run down a declared order of folders, and never back up."""

from __future__ import annotations

import importlib

import pytest
from source_tree import imports, modules, names_from, within

from flashmoe import policies
from flashmoe.policies.base import Policy
from flashmoe.policies.parts import compiled

# Top to bottom. A folder, or a file beside the folders, imports only from those below it.
# `flashmoe` is the package's own __init__.py.
ORDER = (
    "__main__", "cli", "chat", "plan", "monitor", "flashmoe", "engines", "local_models", "train",
    "residency", "reading", "memory", "cache", "policies", "store", "quant", "kernels", "trace",
    "events", "disk", "util", "errors",
)  # fmt: skip

MACHINE_CODE = "flashmoe.util.machine_code"
PUBLIC = "flashmoe"  # what users import: its `load` reaches every engine


def arrows(*packages: str) -> list[tuple[str, str]]:
    """Every (importer, imported) whose importer lies in these packages."""
    return [
        (module, target)
        for module in sorted(modules())
        if within(module, packages)
        for target in imports(module)
    ]


def room(module: str) -> str:
    """The folder below flashmoe/ that a module lies in, or the file, if it lies in none."""
    return module.split(".")[1] if "." in module else module


def engine(module: str) -> str | None:
    """The folder of one engine that a module lies in."""
    parts = module.split(".")
    is_engine = parts[:2] == ["flashmoe", "engines"] and len(parts) > 2
    name = ".".join(parts[:3])
    return name if is_engine and modules()[name].name == "__init__.py" else None


def test_the_order_names_every_folder_once():
    assert sorted(ORDER) == sorted(
        {room(module) for module in modules() if within(module, [PUBLIC])}
    )


def test_imports_run_down_the_order_of_folders():
    breaks = [
        f"{module} -> {target}"
        for module, target in arrows("flashmoe")
        if within(target, [PUBLIC]) and ORDER.index(room(target)) < ORDER.index(room(module))
    ]
    assert breaks == []


def test_folders_side_by_side_import_in_no_circle():
    """In every folder, also inside an engine; a folder's own files are left out."""
    packages = {name for name, path in modules().items() if path.name == "__init__.py"}
    neighbours: dict[str, set[str]] = {package: set() for package in packages}
    for module, target in arrows("flashmoe"):
        ours, theirs = _apart(module, target)
        if ours in packages and theirs in packages and ours != theirs:
            neighbours[ours].add(theirs)
    assert _circle(neighbours) is None


def _apart(module: str, target: str) -> tuple[str, str]:
    """The two names up to the first part in which they differ."""
    ours, theirs = module.split("."), target.split(".")
    shared = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), -1)
    return ".".join(ours[: shared + 1]), ".".join(theirs[: shared + 1])


def _circle(neighbours: dict[str, set[str]]) -> list[str] | None:
    """One circle of a graph, or None: nodes that lead nowhere are taken away, again and again."""
    left = {node: set(others) for node, others in neighbours.items()}
    while ends := [node for node, others in left.items() if not others & left.keys()]:
        for node in ends:
            del left[node]
    if not left:
        return None
    walk = [min(left)]
    while walk[-1] not in walk[:-1]:
        walk.append(min(left[walk[-1]] & left.keys()))
    return walk[walk.index(walk[-1]) :]


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("flashmoe", ("baselines", "harness")),
        ("baselines", ("harness",)),
        ("harness.runs", ("harness.tables", "harness.commands")),
        ("harness.report", ("harness.tables", "harness.commands")),
    ],
)
def test_a_package_does_not_import(package, forbidden):
    assert [arrow for arrow in arrows(package) if within(arrow[1], forbidden)] == []


def test_no_engine_imports_another():
    wrong = [
        (module, target)
        for module, target in arrows("flashmoe.engines")
        if engine(module) and target in modules() and engine(target) not in (None, engine(module))
    ]
    assert wrong == []


def test_an_engine_is_imported_by_engines_and_commands_only():
    wrong = [
        (module, target)
        for module, target in arrows("flashmoe")
        if target in modules() and engine(target)
        if not within(module, ["flashmoe.engines", "flashmoe.cli"]) and module != PUBLIC
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("libraries", "home"),
    [
        (("transformers",), "flashmoe.engines.transformers"),
        (("llama_cpp", "gguf", "elftools"), "flashmoe.engines.llama"),
    ],
)
def test_one_engine_alone_imports_its_library(libraries, home):
    wrong = [
        (module, target)
        for module, target in arrows("flashmoe")
        if within(target, libraries) and not within(module, [home])
    ]
    assert wrong == []


@pytest.mark.parametrize("name", policies.available())
def test_the_key_of_compiled_code_covers_every_file_with_compiled_code(name):
    """Else an edit of such a file would go on running the machine code of before."""
    policy_class = policies.available()[name]
    covered = set(compiled.sources(policy_class))
    for module in _reachable(policy_class.__module__) | {"flashmoe.cache.serving"}:
        if _has_machine_code(module):
            assert modules()[module] in covered, module
            for target in set(imports(module)) & modules().keys():
                constants = {name for name in names_from(module, target) if name.isupper()}
                assert not constants or modules()[target] in covered, (module, target, constants)


def _has_machine_code(module: str) -> bool:
    kernels = names_from(module, "flashmoe.policies.parts.compiled") & {"kernel"}
    return bool(kernels | (names_from(module, MACHINE_CODE) & {"helper", "compiled"}))


def _reachable(module: str) -> set[str]:
    """A module, and every module of ours that it imports, directly or through others."""
    waiting, reachable = [module], {module}
    while waiting:
        targets = set(imports(waiting.pop())) & modules().keys() - reachable - {PUBLIC}
        reachable |= targets
        waiting += targets
    return reachable


def test_a_circle_of_folders_would_be_seen():
    chain = {"a": {"b"}, "b": {"c"}, "c": set(), "d": {"a"}}
    assert _circle(chain) is None
    assert _circle(chain | {"c": {"a"}}) == ["a", "b", "c", "a"]
    apart = _apart("flashmoe.engines.x.a", "flashmoe.engines.y.b")
    assert apart == ("flashmoe.engines.x", "flashmoe.engines.y")


@pytest.mark.parametrize("name", ["residency.at_once_work", "engines.llama.decode_event"])
def test_so_does_the_key_of_what_is_called_by_its_address(name):
    """Its own file is numba's to watch."""
    module = importlib.import_module(f"flashmoe.{name}")
    covered = {*compiled.sources(Policy), *module.SOURCES}
    for target in set(imports(module.__name__)) & modules().keys():
        constants = {name for name in names_from(module.__name__, target) if name.isupper()}
        if constants or "helper" in names_from(target, MACHINE_CODE):
            assert modules()[target] in covered, target
