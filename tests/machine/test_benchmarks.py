"""asv's timed benchmarks: run once each here, timed by pytest-benchmark in `nox -s benchmarks`."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest

import harness.benchmarks


def timed():
    for info in pkgutil.iter_modules(harness.benchmarks.__path__):
        module = importlib.import_module(f"harness.benchmarks.{info.name}")
        for _, kind in inspect.getmembers(module, inspect.isclass):
            if kind.__module__ != module.__name__:
                continue
            for name, method in inspect.getmembers(kind, inspect.isfunction):
                for parameter in kind.params:
                    if name.startswith("time_"):
                        label = f"{kind.__name__}.{name}[{parameter}]"
                        yield pytest.param(kind, method, parameter, id=label)


@pytest.mark.parametrize(("kind", "method", "parameter"), timed())
def test_benchmark(benchmark, kind, method, parameter):
    instance = kind()
    instance.setup(parameter)
    try:
        benchmark(method, instance, parameter)
    finally:
        if hasattr(instance, "teardown"):
            instance.teardown(parameter)
