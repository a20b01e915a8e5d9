"""The engine's reader against fio, on the file system of the temporary directory."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from harness.runs import ssd

FILE_BYTES = 192 << 20
SECONDS = 0.3
ROUNDS = 3


class Reader:
    """Random extents of the demo's and of OLMoE-1B-7B's size, four in flight."""

    params = tuple(ssd.EXTENT_BYTES.values())
    param_names = ("extent_bytes",)
    timeout = 300

    def setup(self, extent_bytes: int) -> None:
        if ssd.fio_path() is None:
            raise NotImplementedError("fio is missing")  # asv's way of skipping
        self.folder = TemporaryDirectory(prefix="flashmoe-benchmark-")
        self.file = ssd.test_file(Path(self.folder.name), FILE_BYTES)
        self.path = self.file.__enter__()
        self.engine = ssd.working_engine(self.path)
        self.bench = ssd.ReaderBench(self.path, extent_bytes, 4)
        self.bench.bytes_per_second(SECONDS)

    def teardown(self, extent_bytes: int) -> None:
        self.bench.close()
        self.file.__exit__(None, None, None)
        self.folder.cleanup()

    def track_share_of_fio(self, extent_bytes: int) -> float:
        """Median of pairs, run in turn."""
        ratios = []
        for _ in range(ROUNDS):
            theirs = ssd.fio(self.path, extent_bytes, 4, "random", self.engine, SECONDS)
            ratios.append(self.bench.bytes_per_second(SECONDS) / theirs["bytes_per_second"])
        return sorted(ratios)[ROUNDS // 2]
