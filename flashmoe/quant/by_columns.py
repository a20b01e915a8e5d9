"""Multiplies a few tokens by weights of 4 bits that lie as [in, out], eight of them in a word.

As `by_rows`, but each thread takes some of the outputs, and goes through all inputs. A group's
zero point is taken off its sum: sum(x * (number - zero)) = sum(x * number) - zero * sum(x).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from flashmoe.kernels.torch_threads import REORDERED, Threaded
from flashmoe.quant.by_rows import products
from flashmoe.quant.small_floats import small_number
from flashmoe.util.machine_code import helper

_BLOCK = 64  # words of outputs, whose sums stay in the nearest cache
_WORD = 8  # outputs in a word, of a weight or of its zero points
_AT_ONCE = 4  # inputs of a word of outputs


class Columns(NamedTuple):
    """A weight of which a word holds eight inputs of one output, the lowest bits first."""

    words: torch.Tensor  # int32 [in / 8, out]
    groups: torch.Tensor  # int32 [in]: the group of each input
    zeros: torch.Tensor  # int32 [groups, out / 8], eight outputs a word
    scales: torch.Tensor  # float32 [groups, out]


class Rows(NamedTuple):
    """A weight of which a word holds eight outputs of one input. Groups are of one size."""

    words: torch.Tensor  # int32 [in, out / 8]
    zeros: torch.Tensor  # int32 [groups, out / 8]
    scales: torch.Tensor  # float32 [groups, out]


def times_columns(weights: Sequence[Columns], x: torch.Tensor, ones: int) -> torch.Tensor | None:
    """x [many, n, in] float32 times weights that are alike: [many, n, out].

    ones: added to each word of zero points, whose carry goes from one to the next. None where an
    input's group is none of the weight's.
    """
    wrong = torch.zeros(1, dtype=torch.int32)
    with_wrong = [(*weight, wrong) for weight in weights]
    rows = weights[0].scales.shape[1]
    out = products(_columns_kernel(ones), rows, with_wrong, x.contiguous(), rows_at_once=_WORD)
    return None if wrong.item() else out


def times_rows(
    weights: Sequence[Rows], x: torch.Tensor, places: tuple[int, ...]
) -> torch.Tensor | None:
    """x [many, n, in] float32 times weights that are alike: [many, n, out].

    places: of a word's eight outputs in its bits. None where groups have an odd size.
    """
    words, zeros, scales = weights[0]
    if len(words) // len(zeros) % _AT_ONCE:
        return None
    kernel = _rows_kernel(places)
    return products(kernel, scales.shape[1], weights, x.contiguous(), rows_at_once=_WORD)


@helper
def _in_order(groups, count):
    """Each group's inputs follow each other, in whole words."""
    size = len(groups) // count
    for k in range(len(groups)):
        if groups[k] != k // size:
            return False
    return size % 8 == 0


@helper
def _are_wrong(groups, count):
    """A group is not there, or one of several has all inputs, which an old writer means else."""
    most = 0
    for group in groups:
        if group < 0 or group >= count:
            return True
        most = max(most, group)
    return count > 1 and most == 0


@helper
def _number(word, shift):
    """Four bits of a word."""
    return small_number(np.int32(word >> np.int32(shift)) & 15)


@helper
def _add_word(sums, words, x):
    """To each output's sum, the products of eight inputs."""
    x0, x1, x2, x3, x4, x5, x6, x7 = x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]
    for c in range(len(words)):
        word = words[c]
        sums[c] += (
            x0 * _number(word, 0)
            + x1 * _number(word, 4)
            + x2 * _number(word, 8)
            + x3 * _number(word, 12)
            + x4 * _number(word, 16)
            + x5 * _number(word, 20)
            + x6 * _number(word, 24)
            + x7 * _number(word, 28)
        )


@helper
def _add_input(sums, words, place, x):
    """To each output's sum, the product of one input, which lies in a place of the word."""
    for c in range(len(words)):
        sums[c] += x * _number(words[c], 4 * place)


@cache
def _columns_kernel(ones: int) -> Threaded:
    one_each = np.int32(ones)

    def add_group(total, sums, zeros, scales, of_x):
        for c in range(len(scales)):
            zero = _number(zeros[c >> 3] + one_each, 4 * (c & 7))
            total[c] += scales[c] * (sums[c] - zero * of_x)

    add_group = helper(add_group)

    def products(tensors, first, last):
        words, groups, zeros, scales, wrong, x, out = tensors
        if _are_wrong(groups, len(scales)):
            wrong[0] = 1
            return
        in_order = _in_order(groups, len(scales))
        size = len(groups) // len(scales) if in_order else 1  # in no order (desc_act): one by one
        sums = np.empty(8 * _BLOCK, np.float32)
        for start in range(first, last, _BLOCK):
            end = min(start + _BLOCK, last)
            for token in range(x.shape[0]):
                total = out[token, 8 * start : 8 * end]
                total[:] = 0
                for k in range(0, len(groups), size):
                    sums[:] = 0
                    of_x = np.float32(0)
                    if in_order:
                        for row in range(k // 8, (k + size) // 8):
                            eight = x[token, 8 * row : 8 * row + 8]
                            _add_word(sums, words[row, 8 * start : 8 * end], eight)
                            for i in range(8):
                                of_x += eight[i]
                    else:
                        of_x += x[token, k]
                        _add_input(sums, words[k // 8, 8 * start : 8 * end], k % 8, x[token, k])
                    own = groups[k]
                    add_group(
                        total, sums, zeros[own, start:end], scales[own, 8 * start : 8 * end], of_x
                    )

    return Threaded(products, __name__, (Path(__file__),), REORDERED)


@helper
def _add_four(sums, words, shift, x):
    """To each sum of an output with this place in its word, the products of four inputs."""
    first, second, third, fourth = words
    x0, x1, x2, x3 = x[0], x[1], x[2], x[3]
    for c in range(len(first)):
        sums[c] += (
            x0 * _number(first[c], shift)
            + x1 * _number(second[c], shift)
            + x2 * _number(third[c], shift)
            + x3 * _number(fourth[c], shift)
        )


@cache
def _rows_kernel(places: tuple[int, ...]) -> Threaded:
    shifts = np.array([4 * place for place in places], np.int32)

    def products(tensors, first, last):
        words, zeros, scales, x, out = tensors
        size = len(words) // len(scales)
        sums = np.empty((8, _BLOCK), np.float32)
        for start in range(first, last, _BLOCK):
            end = min(start + _BLOCK, last)
            for token in range(x.shape[0]):
                total = out[token, 8 * start : 8 * end]
                total[:] = 0
                for group in range(len(scales)):
                    sums[:] = 0
                    of_x = np.float32(0)
                    for k in range(group * size, (group + 1) * size, _AT_ONCE):
                        four = x[token, k : k + _AT_ONCE]
                        of_x += four[0] + four[1] + four[2] + four[3]
                        rows = (
                            words[k, start:end],
                            words[k + 1, start:end],
                            words[k + 2, start:end],
                            words[k + 3, start:end],
                        )
                        for i in range(8):
                            _add_four(sums[i], rows, shifts[i], four)
                    for c in range(end - start):
                        for i in range(8):
                            zero = _number(zeros[group, start + c], shifts[i])
                            scale = scales[group, 8 * (start + c) + i]
                            total[8 * c + i] += scale * (sums[i, c] - zero * of_x)

    return Threaded(products, __name__, (Path(__file__),), REORDERED)
