"""Memory of plain weights: used again, and never while somebody has the weight."""

from __future__ import annotations

import subprocess
import sys

import torch

from flashmoe.quant import plain_memory
from flashmoe.quant.plain_memory import empty

_GROWTH = """
import resource, torch
from flashmoe import quant

def parts(rows, columns):
    drawn = quant.formats()["mxfp4"]().random(rows, columns, torch.Generator())
    return {f"0.{name}": part for name, part in drawn.items()}

format, x = quant.formats()["mxfp4"](), torch.ones(20, 2880, dtype=torch.bfloat16)
both, kept = [parts(5760, 2880), parts(2880, 2880)], []
for number in range(40):
    for each in both:
        kept.append(x @ format.dense(each, torch.bfloat16, transposed=True))
    if number == 4:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def test_a_weight_gets_the_memory_of_one_that_is_gone():
    first = empty((30, 7), torch.bfloat16)
    address = first.data_ptr()
    row = first[3]
    del first
    assert empty((30, 7), torch.bfloat16).data_ptr() != address  # a view is still there
    row.fill_(1)
    del row
    again = empty((7, 15), torch.float32)
    assert again.data_ptr() == address
    assert empty((7, 14), torch.float32).data_ptr() != address


def test_no_two_weights_share_memory():
    weights = [empty((8, 8), torch.bfloat16).fill_(number) for number in range(9)]
    assert all((weight == number).all() for number, weight in enumerate(weights))


def test_few_unused_ones_are_kept():
    weights = [empty((11, number), torch.bfloat16) for number in range(1, 20)]
    del weights
    for number in range(20, 30):
        empty((11, number), torch.bfloat16)
        assert len(plain_memory._blocks) <= plain_memory._KEPT


def test_a_prompts_weights_take_no_more_memory_than_one():
    """They are of a size at which glibc keeps what is given back."""
    done = subprocess.run(
        [sys.executable, "-c", _GROWTH], capture_output=True, text=True, timeout=120, check=True
    )
    assert int(done.stdout) < 100  # MiB; every weight takes 48
