"""Variances, norms of vectors and the normalisations that use them, against the network as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from laws import close, law, offline
from torch import Tensor, nn

import dissect
from dissect.errors import NotStreamable

PRESETS = pytest.mark.parametrize("preset", ["exact", pytest.param("causal", marks=pytest.mark.slow), "d3d"])
STRIDES = pytest.mark.parametrize("stride", [1, 2])


class Between(nn.Module):
    """A convolution, what is under test, and a convolution that sees what is left and right of it."""

    def __init__(self, middle: Callable[[Tensor], Tensor], stride: int = 1) -> None:
        super().__init__()
        self.before = nn.Conv3d(2, 4, 3, (stride, 1, 1), 1)
        self.middle = middle
        self.after = nn.Conv3d(4, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(F.relu(self.middle(self.before(x))))


class Ended(nn.Module):
    """A convolution, and a statistic over time that a linear layer reads."""

    def __init__(self, statistic: Callable[[Tensor], Tensor], stride: int = 1) -> None:
        super().__init__()
        self.before = nn.Conv3d(2, 4, 3, (stride, 1, 1), 1)
        self.statistic = statistic
        self.last = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.statistic(self.before(x)).flatten(1))


def made(
    network: nn.Module, frames: int = 10, plane: tuple[int, int] = (5, 4), rows: int = 1
) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    clip = torch.randn(rows, 2, frames, *plane)
    network(clip)
    for parameter in network.parameters():
        nn.init.normal_(parameter, 0, 0.5)
    for module in network.modules():
        if isinstance(getattr(module, "running_var", None), Tensor):
            module.running_mean.uniform_(-1, 1)  # type: ignore[union-attr,operator]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr,operator]
    return network.double().eval(), clip.double()


def frames(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """A layer on single frames, merged with the batch."""

    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], -1)).transpose(1, 2)

    return Frames()


def last(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """A layer on channels that come last."""

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.movedim(1, -1)).movedim(-1, 1)

    return Last()


# Statistics of single frames

OF_FRAMES: dict[str, Callable[[], Any]] = {
    "group norm of frames": lambda: frames(nn.GroupNorm(2, 4)),
    "group norm of frames, no weights": lambda: frames(nn.GroupNorm(4, 4, affine=False)),
    "instance norm of frames": lambda: frames(nn.InstanceNorm2d(4, affine=True)),
    "instance norm, running": lambda: nn.InstanceNorm3d(4, affine=True, track_running_stats=True),
    "layer norm of a plane": lambda: nn.LayerNorm([5, 4]),
    "layer norm of channels": lambda: last(nn.LayerNorm(4)),
    "RMS norm of channels": lambda: last(nn.RMSNorm(4)),
    "length one over channels": lambda: lambda y: F.normalize(y, dim=1),
    "length one over space": lambda: lambda y: F.normalize(y, p=1, dim=(3, 4)),
    "variance over channels": lambda: lambda y: y * y.var(1, keepdim=True),
    "deviation over space": lambda: lambda y: y / (1 + y.std((3, 4), unbiased=False, keepdim=True)),
    "both over channels": lambda: (
        lambda y: (y - torch.var_mean(y, 1, keepdim=True)[1]) / torch.std_mean(y, 1, keepdim=True)[0]
    ),
    "norms of channels": lambda: (
        lambda y: y + torch.linalg.vector_norm(y, 3, 1, True) + y.norm(p=float("inf"), dim=1, keepdim=True)
    ),
}


@pytest.mark.parametrize("name", OF_FRAMES)
@PRESETS
def test_of_single_frames(name: str, preset: str) -> None:
    network, clip = made(Between(OF_FRAMES[name](), 2))
    stream = dissect.convert(network, clip, preset=preset)
    dissect.verify(stream, network, runtime=False).check()
    assert {row.path for row in stream.plan.rows} == {"before", "after"}
    if preset == "exact":
        assert stream.plan.exact
        assert offline(stream, network, clip, [10, 9, 6, 1]) > 2


# Statistics that end time

ENDING: dict[str, Callable[[Tensor], Tensor]] = {
    "std": lambda y: y.std(2),
    "variance, kept": lambda y: y.var(2, unbiased=False, keepdim=True),
    "of everything": lambda y: y.var((2, 3, 4)),
    "flattened": lambda y: y.flatten(2).std(2),
    "corrected by two": lambda y: torch.var(y, (2, 4), correction=2),
    "with the mean": lambda y: torch.cat(torch.std_mean(y, 2), 1),
    "variance and mean": lambda y: torch.cat(torch.var_mean(y, (2, 3, 4), keepdim=True), 1),
    "length": lambda y: y.norm(dim=2),
    "sum of sizes": lambda y: torch.linalg.vector_norm(y, 1, (2, 3)),
    "cube": lambda y: torch.linalg.vector_norm(y, 3, 2, keepdim=True),
    "largest": lambda y: torch.linalg.vector_norm(y, float("inf"), 2),
    "smallest": lambda y: torch.linalg.vector_norm(y, -float("inf"), (2, 4)),
    "how many": lambda y: torch.linalg.vector_norm(F.relu(y), 0, 2),
    "without space": lambda y: y.mean((3, 4)).std(2),
    "after a crop": lambda y: y[:, :, 1:-1].std(2),
}


@pytest.mark.parametrize("name", ENDING)
@STRIDES
def test_that_end_time_are_exact(name: str, stride: int) -> None:
    network, clip = made(Ended(ENDING[name], stride))
    stream = dissect.convert(network, clip, preset="exact")
    assert stream.plan.exact, str(stream.plan)
    law(stream, torch.randn(2, 2, 13, 5, 4, dtype=torch.float64))
    assert offline(stream, network, clip, [10, 9, 8, 7]) == 4


@pytest.mark.parametrize("name", ENDING)
@pytest.mark.parametrize("preset", ["causal", "d3d"])
def test_that_end_time_without_delay(name: str, preset: str) -> None:
    network, clip = made(Ended(ENDING[name], 2))
    stream = dissect.convert(network, clip, preset=preset)
    dissect.verify(stream, network, runtime=False).check()
    assert stream.timing.delay == 0


def test_large_means_lose_no_digits() -> None:
    """A mean of squares less the square of the mean would lose all of them."""
    network, clip = made(Ended(lambda y: (y + 1e6).std(2)))
    stream = dissect.convert(network, clip, preset="exact")
    assert offline(stream, network, clip, [10, 7], tolerance=1e-8) == 2


@pytest.mark.parametrize(("pool", "window"), [("cumulative", None), ("none", None), ("window", 3)])
@PRESETS
def test_other_windows(pool: str, window: int | None, preset: str) -> None:
    network, clip = made(Ended(lambda y: y.var(2, unbiased=False)))
    stream = dissect.convert(network, clip, preset=preset, pool=pool, window=window)
    law(stream, torch.randn(2, 2, 9, 5, 4, dtype=torch.float64))
    assert stream.plan.exact == (preset == "exact" and pool == "cumulative")
    if stream.plan.exact:
        assert offline(stream, network, clip, [10, 9, 4]) == 3


# Statistics of the clip by which every frame is normalised

OF_THE_CLIP: dict[str, Callable[[], Any]] = {
    "instance norm": lambda: nn.InstanceNorm3d(4, affine=True),
    "instance norm, no weights": lambda: nn.InstanceNorm3d(4),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "layer norm": lambda: lambda y: F.layer_norm(y, y.shape[1:]),
    "layer norm over time": lambda: lambda y: F.layer_norm(y, y.shape[2:]),
    "batch norm without statistics": lambda: nn.BatchNorm3d(4, track_running_stats=False),
    "batch norm of frames without statistics": lambda: frames(nn.BatchNorm2d(4, track_running_stats=False)),
    "deviation": lambda: lambda y: y / (1 + y.std(2, keepdim=True)),
    "both": lambda: (
        lambda y: (y - torch.var_mean(y, (2, 3, 4), keepdim=True)[1]) / torch.std_mean(y, (2, 3, 4), keepdim=True)[0]
    ),
    "length one over time": lambda: lambda y: F.normalize(y, dim=2),
}


@pytest.mark.parametrize("name", OF_THE_CLIP)
@STRIDES
@PRESETS
def test_of_the_clip_see_the_past(name: str, stride: int, preset: str) -> None:
    network, clip = made(Between(OF_THE_CLIP[name](), stride))
    stream = dissect.convert(network, clip, preset=preset)
    dissect.verify(stream, network, runtime=False).check()
    assert (
        any(row.path not in ("before", "after") and "past" in row.reason for row in stream.plan.approximate)
        or preset != "exact"
    )
    assert not stream.plan.exact
    if preset != "exact":
        assert stream.timing.delay == 0


@pytest.mark.parametrize("name", OF_THE_CLIP)
@STRIDES
def test_of_the_clip_are_exact_for_those_who_wait(name: str, stride: int) -> None:
    network, clip = made(Between(OF_THE_CLIP[name](), stride))
    stream = dissect.convert(network, clip, preset="exact", overrides={"*": {"wait": True}})
    assert stream.plan.exact, str(stream.plan)
    law(stream, torch.randn(2, 2, 13, 5, 4, dtype=torch.float64))
    assert offline(stream, network, clip, [10, 9, 8, 5]) == 4


@pytest.mark.parametrize("name", ["instance norm", "group norm", "layer norm over time"])
def test_the_newest_frame_is_normalised_by_all_of_the_clip(name: str) -> None:
    """In `exact`, what is approximate is the frames before the last one."""
    network, clip = made(nn.Sequential(nn.Conv3d(2, 4, 1), Norm(OF_THE_CLIP[name]())))
    stream = dissect.convert(network, clip, preset="exact")
    close(stream.offline(clip)[:, :, -1], network(clip)[:, :, -1])


class Norm(nn.Module):
    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        return self.middle(x)


@PRESETS
def test_cumulative_statistics_of_the_clip(preset: str) -> None:
    network, clip = made(Between(nn.InstanceNorm3d(4)))
    stream = dissect.convert(network, clip, preset=preset, pool="cumulative")
    law(stream, torch.randn(2, 2, 13, 5, 4, dtype=torch.float64))
    assert not stream.plan.exact


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: Ended(lambda y: (y - y.std(0, keepdim=True)).mean(2)), "over the batch"),
        (lambda: Ended(lambda y: F.batch_norm(y.mean((2, 3, 4)), None, None, training=True)), "rows of the batch"),
    ],
    ids=["over the batch", "a batch of one"],
)
@PRESETS
def test_what_cannot_be_streamed_is_refused_by_name(build: Callable[[], nn.Module], said: str, preset: str) -> None:
    network, clip = made(build(), rows=2)
    with pytest.raises(NotStreamable, match=said):
        dissect.convert(network, clip, preset=preset)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*OF_FRAMES, *ENDING, *OF_THE_CLIP])
@PRESETS
def test_in_the_runtime(name: str, preset: str) -> None:
    middles = {**OF_FRAMES, **OF_THE_CLIP}
    network, clip = made(Between(middles[name](), 2) if name in middles else Ended(ENDING[name], 2))
    dissect.verify(dissect.convert(network, clip, preset=preset), network).check()


@PRESETS
def test_weights_that_tell_positions_apart(preset: str) -> None:
    network, clip = made(Between(nn.LayerNorm([10, 5, 4])))
    stream = dissect.convert(network, clip, preset=preset)
    law(stream, torch.randn(2, 2, 13, 5, 4, dtype=torch.float64))
    assert not stream.plan.exact


class Block(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv3d(channels, out, 3, stride, 1, bias=False), nn.GroupNorm(2, out)
        self.conv2, self.norm2 = nn.Conv3d(out, out, 3, 1, 1, bias=False), nn.GroupNorm(2, out)
        self.skip = (
            nn.Sequential(nn.Conv3d(channels, out, 1, stride, bias=False), nn.GroupNorm(2, out))
            if channels != out
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.skip(x))


class ResNet(nn.Module):
    """A 3D ResNet with group norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv3d(2, 4, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False), nn.GroupNorm(2, 4), nn.ReLU()
        )
        self.blocks = nn.Sequential(Block(4, 4, 1), Block(4, 6, 2))
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.adaptive_avg_pool3d(self.blocks(self.stem(x)), 1).flatten(1))


class VNet(nn.Module):
    """In the style of V-Net: instance norms and PReLU, strided convolution down, transposed convolution up."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1, self.act = nn.Conv3d(2, 4, 5, padding=2), nn.InstanceNorm3d(4), nn.PReLU(4)
        self.down, self.norm2, self.inner = nn.Conv3d(4, 6, 2, 2), nn.InstanceNorm3d(6), nn.Conv3d(6, 6, 3, padding=1)
        self.up, self.norm3, self.out = nn.ConvTranspose3d(6, 4, 2, 2), nn.InstanceNorm3d(4), nn.Conv3d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.act(self.norm1(self.first(x)))
        y = F.elu(self.norm2(self.down(skip)))
        y = F.elu(self.norm3(self.up(self.inner(y) + y)))
        return F.log_softmax(self.out(torch.cat([y, skip], 1)), 1)


@pytest.mark.parametrize("build", [ResNet, VNet])
@PRESETS
def test_networks(build: Callable[[], nn.Module], preset: str) -> None:
    network, _ = made(build(), 8, (8, 8))
    clip = torch.rand(1, 2, 8, 8, 8, dtype=torch.float64)
    stream = dissect.convert(network, clip, preset=preset)
    dissect.verify(stream, network).check()
    assert stream.timing.delay == 0 or preset == "exact"
    if preset == "exact":
        stream = dissect.convert(network, clip, preset=preset, overrides={"*": {"wait": True}})
        assert stream.plan.exact, str(stream.plan)
        assert offline(stream, network, clip, [8, 6]) == 2
