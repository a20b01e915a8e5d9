"""Compiled policies are kept where a user has room, and compiled anew where there is none."""

from __future__ import annotations

import errno
import os
import pwd
import subprocess
import sys

import numpy as np
import pytest

from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.events import Event
from flashmoe.policies import get
from flashmoe.policies.base import Scope
from flashmoe.policies.parts import compiled
from flashmoe.util import machine_code


def serve_some() -> int:
    """Hits of a policy that is compiled anew, for whatever lies in the cache folder now."""
    compiled.kernel.cache_clear()
    machine_code.compiled.cache_clear()
    cache = ExpertCache(get("lru", online=True)(Scope(8, 2, 1, 0, 1), 4))
    for rows in ([[1, 2]], [[2, 3]], [[1, 3]]):
        event = Event.of_rows(np.array(rows), 0, np.ones((1, 2), np.float32), None)
        list(cache.waves(event))
    compiled.kernel.cache_clear()
    machine_code.compiled.cache_clear()
    return cache.hits


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "flashmoe" / "compiled"


ENDS_WHILE_A_THREAD_COMPILES = """
import threading, time
from flashmoe.util.machine_code import compiling

held = threading.Event()

def hold():
    with compiling:
        held.set()
        time.sleep(0.3)
        print("compiled", flush=True)

threading.Thread(target=hold, daemon=True).start()
held.wait()
"""


def test_a_process_that_ends_awaits_its_compiler():
    """LLVM would abort, as it did under a short llama-bench."""
    command = [sys.executable, "-c", ENDS_WHILE_A_THREAD_COMPILES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "compiled\n"), done.stderr


def test_policies_compile_where_nobody_has_a_home(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def unknown(user):
        raise KeyError(user)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(RuntimeError):
        machine_code.cache_folder()
    assert serve_some() == 3


@pytest.mark.parametrize("folder", ["/dev/null/cache", "/proc/none"])
def test_policies_compile_where_nothing_can_be_kept(monkeypatch, folder):
    monkeypatch.setenv("XDG_CACHE_HOME", folder)
    assert serve_some() == 3


@pytest.mark.parametrize("configured", ["", "relative/cache", "."])
def test_a_relative_cache_folder_does_not_count(monkeypatch, tmp_path, configured):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", configured)
    assert machine_code.cache_folder() == tmp_path / "home" / ".cache" / "flashmoe"
    monkeypatch.setenv("HOME", "home")
    with pytest.raises(RuntimeError, match="relative"):
        machine_code.cache_folder()


def test_a_disk_that_fills_up_later_only_costs_time(own_cache, monkeypatch):
    replace = os.replace

    def full(source, target):
        if str(target).startswith(str(own_cache)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert serve_some() == 3


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
@pytest.mark.parametrize("size", [0, 40])
def test_damaged_compiled_code_is_made_anew(own_cache, suffix, size):
    assert serve_some() == 3
    files = [file for file in own_cache.rglob("*") if file.suffix == suffix]
    sound = {file: file.stat().st_size for file in files}
    assert sound
    for file in files:
        os.truncate(file, size)
    assert serve_some() == 3
    assert {file: file.stat().st_size for file in files} == sound
