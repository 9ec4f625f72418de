"""Convolutions over frames and over histories: one law, and torch's own convolution as the oracle."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dissect.convolution import FrameConv, TemporalConv
from dissect.lowering import LoweredConv
from dissect.primitives import History

BATCH, FRAMES = 2, 7
CONV = {0: F.conv1d, 1: F.conv2d, 2: F.conv3d}


def made(
    dims: int, taps: int, groups: int, spacing: int, pads: tuple[int, int], stride: int, gap: int
) -> tuple[nn.Conv3d, TemporalConv]:
    """A causal convolution of torch's, and ours with its weights; ``dims`` is the number of spatial dimensions."""
    torch.manual_seed(0)
    kernel = {0: (taps,), 1: (taps, 3), 2: (taps, 3, 2)}[dims]
    offline = {0: nn.Conv1d, 1: nn.Conv2d, 2: nn.Conv3d}[dims](
        4, 6, kernel, (1, *[stride] * dims), 0, (spacing, *[gap] * dims), groups
    ).double()
    ours = TemporalConv(
        offline.weight.detach().clone(),
        None if offline.bias is None else offline.bias.detach().clone(),
        ages=[spacing * tap for tap in reversed(range(taps))],
        time=0,
        stride=[stride] * dims,
        padding=[pads] * dims,
        dilation=[gap] * dims,
        groups=groups,
    )
    return offline, ours  # type: ignore[return-value]


def causal(offline: nn.Module, x: Tensor, dims: int, reach: int, pads: tuple[int, int]) -> Tensor:
    """The convolution over ``(N, T, C, ...)`` with zeros before the stream: ``(N, T, out, ...)``."""
    return offline(F.pad(x.movedim(1, 2), [*pads * dims, reach, 0])).movedim(2, 1)


@pytest.mark.parametrize(
    ("dims", "taps", "groups", "spacing", "pads", "stride", "gap"),
    [
        (dims, taps, groups, spacing, pads, stride, gap)
        for dims, taps, groups, spacing in product([0, 1, 2], [2, 3, 5], [1, 2], [1, 2])
        for pads, stride, gap in ([((0, 0), 1, 1)] if dims == 0 else [((1, 1), 1, 1), ((2, 1), 2, 1), ((0, 3), 1, 2)])
    ],
)
def test_chunks_equal_steps_equal_torch(
    dims: int, taps: int, groups: int, spacing: int, pads: tuple[int, int], stride: int, gap: int
) -> None:
    offline, conv = made(dims, taps, groups, spacing, pads, stride, gap)
    x = torch.randn(BATCH, FRAMES, 4, *[6] * dims, dtype=torch.float64)
    reach = spacing * (taps - 1)
    wanted = causal(offline, x, dims, reach, pads)
    for depth in (reach, reach + 2):  # alone, and beside a reader that looks back further
        history = History((4, *[6] * dims), depth)
        for sizes in ([FRAMES], [3, 4], [1, 2, 2, 2]):
            caches: Any = None
            got, at = [], 0
            for size in sizes:
                known, caches = history(x[:, at : at + size].flatten(0, 1), caches, size)
                got.append(conv(known, frames=size).unflatten(0, (BATCH, size)))
                at += size
            torch.testing.assert_close(torch.cat(got, 1), wanted, rtol=0, atol=1e-12)
        caches = tuple(spec.zeros(BATCH, x.dtype) for spec in history.specs)
        lowered = LoweredConv(made(dims, taps, groups, spacing, pads, stride, gap)[1])
        for time in range(FRAMES):
            known, caches = history(x[:, time], caches)
            step = conv(known)
            assert step.dim() <= 4
            torch.testing.assert_close(step, wanted[:, time], rtol=0, atol=1e-12)
            torch.testing.assert_close(lowered(known), wanted[:, time], rtol=0, atol=1e-12)


@pytest.mark.parametrize("ages", [(5, 4, 3), (4, 2), (6, 3)], ids=str)
def test_taps_that_do_not_reach_the_present(ages: tuple[int, ...]) -> None:
    """What is delayed reads only the past; the newest age is then above zero."""
    torch.manual_seed(1)
    weight, x = torch.randn(6, 4, len(ages), 3, 3), torch.randn(BATCH, 9, 4, 5, 5)
    conv = TemporalConv(weight, None, ages=ages, time=0, stride=[1, 1], padding=[(1, 1)] * 2, dilation=[1, 1])
    late = F.pad(x.movedim(1, 2), [1, 1, 1, 1, ages[0], 0])[:, :, : 9 + ages[0] - ages[-1]]
    wanted = F.conv3d(late, weight, dilation=(ages[0] - ages[1], 1, 1)).movedim(2, 1)
    history = History((4, 5, 5), ages[0])
    known, _ = history(x.flatten(0, 1), frames=9)
    torch.testing.assert_close(conv(known, frames=9).unflatten(0, (BATCH, 9)), wanted)
    caches: Any = tuple(spec.zeros(BATCH, x.dtype) for spec in history.specs)
    for time in range(9):
        known, caches = history(x[:, time], caches)
        torch.testing.assert_close(conv(known), wanted[:, time])


@pytest.mark.parametrize("time", [0, 1, 2])
def test_time_at_any_place_of_the_kernel(time: int) -> None:
    torch.manual_seed(2)
    kernel = [3, 3, 3]
    weight, bias = torch.randn(5, 4, *kernel, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    conv = TemporalConv(
        weight, bias, ages=[2, 1, 0], time=time, stride=[1, 1], padding=[(1, 1), (1, 1)], dilation=[1, 1]
    )
    x = torch.randn(BATCH, FRAMES, 4, 5, 5, dtype=torch.float64)
    history = History((4, 5, 5), 2)
    known, _ = history(x.flatten(0, 1), frames=FRAMES)
    got = conv(known, frames=FRAMES).unflatten(0, (BATCH, FRAMES))
    there = x.movedim(1, 2 + time)
    widths = [[1, 1] for _ in range(3)]
    widths[time] = [2, 0]
    wanted = F.conv3d(F.pad(there, [side for pair in reversed(widths) for side in pair]), weight, bias).movedim(
        2 + time, 1
    )
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dims", [0, 1, 2, 3])
def test_a_convolution_inside_the_frame(dims: int, groups: int) -> None:
    torch.manual_seed(3)
    weight, bias = torch.randn(8, 4 // groups, *[3] * dims), torch.randn(8)
    x = torch.randn(6, 4, *[5] * dims)
    conv = FrameConv(
        weight, bias, time=None, stride=[1] * dims, padding=[(1, 1)] * dims, dilation=[1] * dims, groups=groups
    )
    wanted = (
        F.conv1d(x.unsqueeze(-1), weight.unsqueeze(-1), bias, groups=groups).squeeze(-1)
        if dims == 0
        else {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims](x, weight, bias, padding=1, groups=groups)
    )
    torch.testing.assert_close(conv(x), wanted)
    torch.testing.assert_close(conv(x, frames=3), wanted)
    torch.testing.assert_close(
        FrameConv(
            None, None, time=None, stride=conv.stride, padding=conv.padding, dilation=conv.dilation, groups=groups
        )(x, weight, bias),
        wanted,
    )


def test_one_temporal_tap_is_no_temporal_convolution() -> None:
    weight = torch.randn(6, 4, 1, 3, 3)
    conv = FrameConv(weight, None, time=0, stride=[2, 2], padding=[(1, 1)] * 2, dilation=[1, 1])
    x = torch.randn(3, 4, 7, 7)
    torch.testing.assert_close(conv(x), F.conv2d(x, weight[:, :, 0], stride=2, padding=1))


def test_a_weight_keeps_the_layout_of_the_layer_it_comes_from() -> None:
    offline, conv = made(2, 3, 2, 1, (1, 1), 1, 1)
    assert torch.equal(conv.state_dict()["weight"], offline.weight)
    assert torch.equal(conv.state_dict()["bias"], offline.bias)  # type: ignore[arg-type]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("temporal", [True, False])
def test_a_batch_norm_folds_into_a_lowered_convolution(groups: int, temporal: bool) -> None:
    torch.manual_seed(4)
    factor, shift = torch.randn(6), torch.randn(6)
    space: dict[str, Any] = {"time": 0, "stride": [1, 1], "padding": [(1, 1)] * 2, "dilation": [1, 1], "groups": groups}
    weight = torch.randn(6, 4 // groups, 3 if temporal else 1, 3, 3)
    conv = TemporalConv(weight, None, ages=[2, 1, 0], **space) if temporal else FrameConv(weight, None, **space)
    x = torch.randn(2, 4, 5, 5)
    known = (torch.randn(2, 8, 5, 5), x) if temporal else x
    wanted = conv(known) * factor[:, None, None] + shift[:, None, None]
    lowered = LoweredConv(conv)
    lowered.scale(factor, shift)
    torch.testing.assert_close(lowered(known), wanted, rtol=1e-4, atol=1e-4)
