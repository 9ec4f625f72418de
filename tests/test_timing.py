"""Timing: lengths as torch itself computes them, in integers and in tensors."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn

from dissect.timing import Length, Timing, joined

LAYERS = [
    (kernel, stride, padding, dilation)
    for kernel, stride, padding, dilation in product([1, 2, 3, 5], [1, 2, 3], [0, 1, 2], [1, 2])
    if padding <= kernel
]


def length(chain: list[tuple[int, int, int, int]]) -> Length:
    result = Length()
    for kernel, stride, padding, dilation in chain:
        result = result.then(2 * padding - dilation * (kernel - 1) - 1, stride)
    return result


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("second", [(3, 2, 1, 1), (2, 1, 0, 1)], ids=str)
def test_a_length_is_the_one_torch_gives(layer: tuple[int, int, int, int], second: tuple[int, int, int, int]) -> None:
    chain = [layer, second]
    net = nn.Sequential(*[nn.Conv1d(1, 1, k, s, p, d) for k, s, p, d in chain])
    positions = length(chain)
    for frames in range(1, 25):
        try:
            wanted = net(torch.zeros(1, 1, frames)).shape[2]
        except RuntimeError:
            assert positions(frames) <= 0 or length([layer])(frames) <= 0
            continue
        assert positions(frames) == wanted
        assert positions(torch.tensor([frames])).tolist() == [wanted]


def test_lengths_without_a_stride_are_one_step() -> None:
    same = Length().then(2, 1).then(-4, 1)
    assert same == Length()
    assert Length().then(-3).then(-3) == Length(((1, -5, 1),))
    assert Length().then(-1, 2).then(-1, 2) == Length(((1, -1, 2), (1, -1, 2)))


def test_a_length_may_grow() -> None:
    doubled = Length().then(-1, 1, mul=2)
    assert [doubled(frames) for frames in (1, 4, 9)] == [2, 8, 18]
    assert [doubled.then(-1, 2)(frames) for frames in (1, 4, 9)] == [1, 4, 9]


def test_times_of_positions() -> None:
    clock = Timing(stride=2, delay=3, length=Length().then(-1, 2), old=5, new=1)
    assert clock.receptive_field == 5
    assert [clock.last(frames) for frames in (1, 2, 3, 8)] == [3, 3, 5, 9]
    assert clock.delayed(4) == clock.but(delay=7, old=9, new=5)
    assert clock.but(fill=0.0, nonneg=True, padding=(1, 1)).plain() == clock


def test_joined_sees_as_far_as_the_farthest() -> None:
    a, b = Timing(old=3, new=1, removed=2, fill=0.0), Timing(old=7, new=2, removed=4, fill=0.0)
    both = joined([a, b])
    assert (both.old, both.new, both.removed, both.fill) == (7, 1, 4, None)
