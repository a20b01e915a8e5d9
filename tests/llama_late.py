"""`harness.torture.llama_child`, whose server is made a second before Python learns of it."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import xllamacpp

from harness.torture import llama_child

_Server = xllamacpp.Server


def make(common: Any) -> Any:
    server = _Server(common)
    ctypes.PyDLL(None).usleep(1_000_000)  # keeps Python's lock
    return server


xllamacpp.Server = make
llama_child.main(sys.argv[1:])
