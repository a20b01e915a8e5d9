"""Measuring the drive: by fio, by the engine's reader, and made slower on purpose."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flashmoe.errors import FlashMoEError
from harness.runs import ssd
from harness.runs.memory_cap import ReadLimit, memory_cap

ROOT = Path(__file__).parents[2]
needs_fio = pytest.mark.skipif(ssd.fio_path() is None, reason="fio is not installed")


@needs_fio
def test_a_stopped_measurement_leaves_no_fio_behind(tmp_path):
    (tmp_path / "blocks").write_bytes(bytes(1 << 20))
    script = (
        "import pathlib, signal, sys; from harness import __main__; from harness.runs import ssd;"
        "signal.signal(signal.SIGTERM, __main__._stop);"
        "path = pathlib.Path(sys.argv[1]);"
        "ssd.fio(path, 4096, 1, 'random', ssd.working_engine(path), 60)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "blocks")]
    run = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)

    def reading():
        found = psutil.process_iter(["cmdline"])
        return [
            p.pid for p in found if f"--filename={tmp_path}/blocks" in (p.info["cmdline"] or ())
        ]

    until = time.monotonic() + 60
    while not reading() and time.monotonic() < until:
        time.sleep(0.05)
    assert reading()
    time.sleep(1.5)  # by now it has started its jobs
    run.terminate()
    assert run.wait(30) != 0
    until = time.monotonic() + 5  # of the 60 seconds that it would run
    while reading() and time.monotonic() < until:
        time.sleep(0.05)
    assert not reading()


@needs_fio
def test_fio_and_the_reader_measure_the_same_file_and_leave_nothing(tmp_path):
    with ssd.test_file(tmp_path, 32 << 20) as path:
        engine = ssd.working_engine(path)
        for pattern in ("random", "sequential"):
            row = ssd.fio(path, 128 << 10, 4, pattern, engine, 0.3)
            assert row["bytes_per_second"] > 1e6
            assert 0 < row["latency_p50_ms"] <= row["latency_p99_ms"]
        bench = ssd.ReaderBench(path, 48 << 10, 4)
        assert bench.bytes_per_second(0.2) > 1e6
        assert bench.reader.bytes_read > 0
        bench.close()
        with pytest.raises(FlashMoEError, match="fio failed"):
            ssd.fio(path.with_name("none") / "x", 4096, 1, "random", engine, 0.1)
    assert not list(tmp_path.iterdir())


def test_a_drive_too_full_for_the_test_file_is_one_sentence(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    with pytest.raises(FlashMoEError, match="free disk"), ssd.test_file(tmp_path):
        pass


def test_a_drive_can_be_made_slower(tmp_path):
    path = tmp_path / "blocks"
    path.write_bytes(bytes(24 << 20))
    read = """import mmap, os, sys
file, block = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT), mmap.mmap(-1, 1 << 20)
while os.readv(file, [block]):
    pass"""
    try:
        with memory_cap(None, [ReadLimit(tmp_path, 12_000_000)]) as cap:
            if cap is None:
                pytest.skip("no cgroup can be made here")
            os.sync()
            started = time.monotonic()
            done = subprocess.run([sys.executable, "-c", read, path], preexec_fn=cap.enter)
            seconds = time.monotonic() - started
    except FlashMoEError as error:
        pytest.skip(str(error))
    if done.returncode:
        pytest.skip("this file system refuses direct reads")
    assert seconds > 1  # 24 MiB at 12 MB/s take two; the kernel's window lets some pass at once
