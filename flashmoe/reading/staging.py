"""Carries what is read into an accelerator's memory."""

from __future__ import annotations

import threading

import numpy as np
import torch

from flashmoe.disk.direct_io import ALIGNMENT_BYTES
from flashmoe.reading.backend import Backend
from flashmoe.reading.drives import NONE

STAGED_BYTES = 2 << 20  # of pinned memory, for each thread that reads


class _Lane:
    """A thread's way to the device: a pinned buffer, and a stream beside the computing one."""

    def __init__(self, device: torch.device) -> None:
        whole = torch.empty(
            STAGED_BYTES + ALIGNMENT_BYTES, dtype=torch.uint8, pin_memory=device.type != "cpu"
        )
        first = -whole.data_ptr() % ALIGNMENT_BYTES
        self.buffer = whole[first : first + STAGED_BYTES]
        self.view = self.buffer.numpy().data
        self.module = torch.get_device_module(device)
        self.stream = self.module.Stream(device)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Done when it returns; meanwhile other threads run, and the device computes."""
        with torch.inference_mode(), self.module.stream(self.stream):
            target.copy_(source, non_blocking=True)
            event = self.module.Event()
            event.record(self.stream)
        event.synchronize()


class Staging:
    """Reads of one backend by way of pinned memory, 2 MiB a thread. Thread-safe.

    A read is over when its bytes are on the device, so whoever waits for it need know nothing of
    streams. The other threads read while one copies.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._lanes = threading.local()

    def read(
        self, layer: int, expert: int, start: int, memory: torch.Tensor, copy: int = NONE
    ) -> int:
        """As `Backend.read_copy`, into uint8 [bytes] of a device; NONE: of several copies."""
        lane, copies = self._lane(memory.device), set()
        for at in range(0, len(memory), STAGED_BYTES):
            target = memory[at : at + STAGED_BYTES]
            view = lane.view[: len(target)]
            copies.add(self.backend.read_copy(layer, expert, start + at, view, copy))
            lane.copy(target, lane.buffer[: len(target)])
        return copies.pop() if len(copies) == 1 else NONE

    def bytes_of(self, memory: torch.Tensor) -> memoryview:
        """What is on the device, on its way back."""
        lane, content = self._lane(memory.device), np.empty(len(memory), np.uint8)
        for at in range(0, len(memory), STAGED_BYTES):
            source = memory[at : at + STAGED_BYTES]
            lane.copy(lane.buffer[: len(source)], source)
            content[at : at + len(source)] = lane.view[: len(source)]
        return content.data

    def _lane(self, device: torch.device) -> _Lane:
        if not hasattr(self._lanes, "lane"):
            self._lanes.lane = _Lane(device)
        lane: _Lane = self._lanes.lane
        return lane
