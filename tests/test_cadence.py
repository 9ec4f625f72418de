"""The native cadence: outputs of the offline network, and layers that run when their position is due."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, event, given, settings
from laws import close, columns, leaves
from random_networks import Drawn, networks, scrambled
from torch import Tensor, nn

import dissect
from dissect.cadence import Due, Native, native
from dissect.counting import multiply_adds
from dissect.errors import NotStreamable

CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much, HealthCheck.large_base_example]
LIMITS: dict[str, Any] = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": CHECKS}


class Block(nn.Module):
    """A residual block with a temporal stride, as 3D-ResNets have them; ``skip``: what stands in the shortcut."""

    def __init__(self, channels: int, stride: int, skip: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(channels, channels, 3, (stride, 1, 1), 1)
        self.bn = nn.BatchNorm3d(channels)
        self.conv2 = nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0))
        self.skip = (
            nn.Conv3d(channels, channels, 1, (stride, 1, 1)) if skip == "conv" else nn.AvgPool3d(1, (stride, 1, 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.skip(x) + self.conv2(torch.relu(self.bn(self.conv1(x)))))


class Net(nn.Module):
    """A 3D-ResNet in small: a stem, blocks of the given strides, a head."""

    def __init__(self, *strides: int, head: str = "pool", skip: str = "conv", stem: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv3d(2, 4, 3, (stem, 1, 1), 1)
        self.blocks = nn.Sequential(*[Block(4, stride, skip) for stride in strides])
        self.max = nn.MaxPool3d((3, 1, 1), 1, (1, 0, 0)) if head == "max" else nn.Identity()
        self.head, self.fc = head, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        y = self.max(self.blocks(torch.relu(self.stem(x))))
        if self.head == "each":
            return self.fc(y.mean((3, 4)).transpose(1, 2))
        if self.head == "two":
            return {"scores": self.fc(y.mean((2, 3, 4))), "early": x.mean((3, 4))}
        return self.fc(y.mean((2, 3, 4)))


CASES = {
    "stride 2": ((2,), {}),
    "strides 2, 2, 2": ((2, 2, 2), {}),
    "strides 3, 1, 2": ((3, 1, 2), {}),
    "every position": ((2, 1, 2), {"head": "each"}),
    "a max pool in time": ((2, 2), {"head": "max"}),
    "a pool in the shortcut": ((2, 3), {"skip": "pool"}),
    "a stride in the stem": ((2,), {"stem": 2}),
    "outputs of two rates": ((2, 2), {"head": "two"}),
}


def clip(frames: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randn(batch, 2, frames, 5, 5, generator=generator, dtype=torch.float64)


def driven(sparse: Native, stream: dissect.Stream, x: Tensor, flush: int = 0) -> list[list[Tensor | None]]:
    """The outputs of a stream and its flush, one entry a frame, None where none is due: as any runner does it."""
    caches = [cache.spec.zeros(x.shape[0], torch.float64) for cache in sparse.cache_list]
    roles = [cache.spec.role for cache in sparse.cache_list]
    results = []
    for time in range(x.shape[2] + flush):
        if time == x.shape[2]:
            caches[roles.index("length")] = caches[roles.index("age")].clone()
        frame = stream.frame((x,), time) if time < x.shape[2] else [torch.zeros_like(x[:, :, 0])]
        out, *new = sparse.step(*frame, *caches)
        caches = [made if due.at(time) else held for held, made, due in zip(caches, new, sparse.due, strict=True)]
        results.append([leaf if due.at(time) else None for leaf, due in zip(leaves(out), sparse.outputs, strict=True)])
    return results


def agrees(stream: dissect.Stream, sparse: Native, x: Tensor) -> None:
    """At the frames that are due, flush included, the native step gives what the dense stream gives."""
    with torch.no_grad():
        flush = stream.flush_frames(x.shape[2])
        dense = columns(stream, stream.offline(x))
        got = driven(sparse, stream, x, flush)[stream.timing.delay :]
        assert len(got) >= len(dense)
        for time, (row, wanted) in enumerate(zip(got, dense, strict=False)):
            for leaf, want in zip(row, leaves(wanted), strict=True):
                if leaf is not None:
                    close(leaf, want, 1e-9, f"frame {time + stream.timing.delay}")


@pytest.mark.parametrize("preset", ["exact", "causal"])
@pytest.mark.parametrize("case", CASES)
def test_what_is_due_is_what_the_dense_step_gives(case: str, preset: str) -> None:
    strides, settings = CASES[case]
    stream = dissect.convert(scrambled(Net(*strides, **settings), 0).double(), clip(12), preset)
    sparse = native(stream)
    assert sparse is not None
    for frames in (25, 24, 19) if preset == "exact" else (25,):
        agrees(stream, sparse, clip(frames))


@pytest.mark.parametrize("case", CASES)
def test_the_positions_are_those_of_the_network(case: str) -> None:
    strides, options = CASES[case]
    network = scrambled(Net(*strides, **options), 0).double()
    stream = dissect.convert(network, clip(12), "exact")
    sparse = native(stream)
    assert sparse is not None
    for frames in (12, 11, 9):
        with torch.no_grad():
            wanted = leaves(network(clip(frames)))
            got = driven(sparse, stream, clip(frames), stream.flush_frames(frames))
        for index, (want, clock, output) in enumerate(
            zip(wanted, stream.leaf_timings, stream.dissected.outputs, strict=True)
        ):
            times = [clock.delay + clock.stride * position for position in range(clock.length(frames))]
            leaf = [got[time][index] for time in times]
            assert all(part is not None for part in leaf)
            axes = output.value.axes  # type: ignore[union-attr]
            close(leaf[-1] if axes.time is None else torch.stack(leaf, axes.time), want, 1e-9, f"{frames} frames")  # type: ignore[arg-type]


def test_layers_run_when_they_are_due_and_caches_hold_positions() -> None:
    stream = dissect.convert(scrambled(Net(2, 2, 2), 0).double(), clip(16), "exact")
    sparse = native(stream)
    assert sparse is not None
    assert (sparse.period, stream.timing.stride) == (8, 8)
    gaps = {cache.path: due.gap for cache, due in zip(sparse.cache_list, sparse.due, strict=True)}
    assert gaps["stem"] == gaps["blocks.0.conv1"] == gaps["age"] == 1
    assert [gaps[f"blocks.{at}.conv2"] for at in range(3)] == [2, 4, 8]
    depth = {cache.path: cache.spec.shape[:1] for cache in sparse.cache_list}
    assert depth["blocks.2.conv2"] == (2 * 4,), "two positions of four channels, not sixteen frames"
    assert sum(cache.spec.zeros(1, torch.float64).nbytes for cache in sparse.cache_list) < stream.cache_bytes / 2

    frame = (torch.zeros(1, 2, 5, 5, dtype=torch.float64),)
    args = (*frame, *[cache.spec.zeros(1, torch.float64) for cache in sparse.cache_list])
    counts = [multiply_adds(sparse.phase(phase), args) for phase in range(sparse.period)]
    # By hand, in multiply-adds over 25 pixels: convolutions of 27, 27, 3 and 1 taps.
    stem, conv1, conv2, skip = (25 * taps for taps in (27 * 2 * 4, 27 * 4 * 4, 3 * 4 * 4, 4 * 4))
    block = conv1 + conv2 + skip
    assert sum(counts) == 8 * stem + (4 + 2 + 1) * block + 3 * 4
    assert multiply_adds(stream.step, (*frame, *stream.caches(1))) == stem + 3 * block + 3 * 4


def test_without_a_stride_there_is_none() -> None:
    stream = dissect.convert(scrambled(Net(1, 1), 0).double(), clip(8), "exact")
    assert native(stream) is None
    assert native(dissect.convert(scrambled(Net(2, 2), 0).double(), clip(8), "d3d")) is None


def test_parameters_are_shared_and_the_stream_is_left_alone() -> None:
    stream = dissect.convert(scrambled(Net(2), 0).double(), clip(8), "exact")
    before = [cache.spec for cache in stream.cache_list]
    sparse = native(stream)
    assert sparse is not None
    assert [cache.spec for cache in dissect.cadence.forms.caches_of(stream.dissected)] == before  # type: ignore[attr-defined]
    with torch.no_grad():
        stream.clip.fc.weight.mul_(3)  # type: ignore[operator, union-attr]
    agrees(stream, sparse, clip(12))


@pytest.mark.parametrize(
    ("phases", "wanted"),
    [
        ([3], Due(3, 12)),
        ([1, 7], Due(1, 6)),
        ([0, 4, 8], Due(0, 4)),
        ([2, 5], Due(2, 3)),
        ([1, 2], Due(0, 1)),
        ([], Due(0, 12)),
    ],
)
def test_the_sparsest_even_frames(phases: Sequence[int], wanted: Due) -> None:
    from dissect.cadence import _evenly

    assert _evenly(frozenset(phases), 12) == wanted


@settings(max_examples=25, phases=(Phase.generate, Phase.shrink), **LIMITS)
@given(drawn=networks())
def test_random_networks(drawn: Drawn) -> None:
    try:
        stream = dissect.convert(drawn.network, drawn.clip, preset="exact")
    except NotStreamable:
        event("refused")
        return
    sparse = native(stream)
    event("strided" if sparse is not None else "no stride")
    if sparse is None:
        return
    generator = torch.Generator().manual_seed(1)
    frames = drawn.clip.shape[2] + 5
    x = torch.randn(2, drawn.clip.shape[1], frames, *drawn.clip.shape[3:], generator=generator, dtype=torch.float64)
    agrees(stream, sparse, x)
