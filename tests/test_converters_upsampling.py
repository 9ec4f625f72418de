"""Resampling over space and time, against the network as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from laws import law, offline
from torch import Tensor, nn

import dissect
from dissect.errors import NotStreamable

PRESETS = pytest.mark.parametrize("preset", ["exact", pytest.param("causal", marks=pytest.mark.slow), "d3d"])
MODES = [("nearest", None), ("nearest-exact", None), ("trilinear", False), ("trilinear", True)]


class Between(nn.Module):
    """A strided convolution, what is under test, and a convolution that sees what is left and right of it."""

    def __init__(self, middle: Callable[..., Tensor], stride: int = 1, planes: int = 2) -> None:
        super().__init__()
        self.before = nn.Conv3d(2, 3, 3, (stride, 1, 1), 1)
        self.after = nn.Conv3d(3, planes, 3, padding=1)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.middle(self.before(x), x))


def made(network: nn.Module, frames: int, rows: int = 1) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    return network.double().eval(), torch.randn(rows, 2, frames, 6, 5, dtype=torch.float64)


def equal(network: nn.Module, clip: Tensor, lengths: Sequence[int], **options: Any) -> Any:
    """An exact stream, by the law and against the original at several lengths."""
    stream = dissect.convert(network, clip, preset="exact", **options)
    assert stream.plan.exact, str(stream.plan)
    law(stream, torch.randn(2, *clip.shape[1:2], 11, *clip.shape[3:], dtype=torch.float64))
    assert offline(stream, network, clip, lengths) > 1
    return stream


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize(("mode", "align"), [given for given in MODES if not given[1]])
def test_up_by_a_factor(mode: str, align: bool | None, factor: int) -> None:
    scale = (factor, 2, 1.5)
    middle = lambda y, x: F.interpolate(y, scale_factor=scale, mode=mode, align_corners=align)  # noqa: E731
    stream = equal(*made(Between(middle, factor), 12), [12, 11, 10, 7, 1])
    cache = {"trilinear": 2}.get(mode, 1)  # positions that it keeps, whatever the stride
    (row,) = [row for row in stream.plan.rows if "upsample" in row.op]
    assert row.cache_shape is not None
    assert row.cache_shape[0] == 3 * cache


@pytest.mark.parametrize(("mode", "align"), MODES)
@pytest.mark.parametrize("factor", [2, 3])
def test_up_to_the_size_of_the_clip(mode: str, align: bool | None, factor: int) -> None:
    frames = 13 if align else 12
    middle = lambda y, x: F.interpolate(y, size=x.shape[2:], mode=mode, align_corners=align)  # noqa: E731
    equal(*made(Between(middle, factor), frames), range(frames, 0, -factor))


@pytest.mark.parametrize("stride", [4, 6])
@pytest.mark.parametrize("mode", ["nearest", "trilinear"])
def test_up_halfway_and_again(mode: str, stride: int) -> None:
    """What a stride took is given back in two steps, with layers between, and meets a skip connection."""

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Conv3d(2, 3, 3, (stride, 1, 1), 1)
            self.inner = nn.Conv3d(3, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = F.interpolate(self.down(x), scale_factor=(2, 1, 1), mode=mode)
            y = F.interpolate(self.inner(y), scale_factor=(stride // 2, 1, 1), mode=mode)
            return torch.cat([x, y[:, :, : x.shape[2]]], 1)

    equal(*made(Decoder(), 12), [12, 12 - stride])


@pytest.mark.parametrize(("mode", "align"), [given for given in MODES if not given[1]])
@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("stride", [1, 2])
def test_down_by_a_factor(mode: str, align: bool | None, factor: int, stride: int) -> None:
    middle = lambda y, x: F.interpolate(y, scale_factor=(1 / factor, 1, 1), mode=mode, align_corners=align)  # noqa: E731
    equal(*made(Between(middle, stride), 17), [17, 16, 15, 14, 13])


def test_repeated_frames_are_held() -> None:
    middle = lambda y, x: y.repeat_interleave(2, 2).repeat_interleave(2, dim=-1)  # noqa: E731
    equal(*made(Between(middle, 2), 9), [9, 8, 7])


def test_frame_features_without_space() -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(2, 3, 3, 2, 1)
            self.last = nn.Conv1d(3, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = F.interpolate(self.conv(x.mean((3, 4))), scale_factor=2, mode="linear")
            return self.last(F.interpolate(y[:, :, ::2], scale_factor=2))

    equal(*made(Features(), 12), [12, 11, 8])


@pytest.mark.parametrize(
    "options",
    [
        {"scale_factor": 2},
        {"scale_factor": 1.7, "mode": "bilinear"},
        {"size": (4, 9), "mode": "bilinear", "align_corners": True},
        {"scale_factor": 2, "mode": "bicubic"},
        {"scale_factor": 0.5, "mode": "bilinear", "antialias": True},
        {"size": 3, "mode": "nearest-exact"},
        {"scale_factor": 1.5, "mode": "bilinear", "recompute_scale_factor": True},
    ],
    ids=str,
)
@PRESETS
def test_inside_a_frame_nothing_changes(options: dict[str, Any], preset: str) -> None:
    def middle(y: Tensor, x: Tensor) -> Tensor:
        frames = F.interpolate(y.transpose(1, 2).flatten(0, 1), **options)
        return frames.unflatten(0, (y.shape[0], -1)).transpose(1, 2)

    network, clip = made(Between(middle), 7)
    stream = dissect.convert(network, clip, preset=preset)
    dissect.verify(stream, network, runtime=False).check()
    assert not [row for row in stream.plan.rows if "upsample" in row.op]


@pytest.mark.parametrize(("mode", "align"), MODES)
@pytest.mark.parametrize("preset", ["causal", "d3d"])
@pytest.mark.parametrize("how", ["scale", "size"])
def test_a_removed_stride_needs_no_upsampling(mode: str, align: bool | None, preset: str, how: str) -> None:
    given = {"scale_factor": (2, 1, 1)} if how == "scale" else {"size": (12, 6, 5)}
    network, clip = made(Between(lambda y, x: F.interpolate(y, mode=mode, align_corners=align, **given), 2), 12)  # type: ignore[arg-type]
    stream = dissect.convert(network, clip, preset=preset)
    dissect.verify(stream, network, runtime=False).check()
    assert stream.timing.delay == 0
    assert stream.timing.stride == 1
    (row,) = [row for row in stream.plan.approximate if "upsample" in row.op]
    assert "removed" in row.reason


@pytest.mark.parametrize("mode", ["nearest", "trilinear"])
@pytest.mark.parametrize("preset", ["causal", "d3d"])
def test_downsampling_without_delay(mode: str, preset: str) -> None:
    network, clip = made(Between(lambda y, x: F.interpolate(y, scale_factor=(0.5, 1, 1), mode=mode)), 12)
    stream = dissect.convert(network, clip, preset=preset)
    dissect.verify(stream, network, runtime=False).check()
    assert stream.timing.delay == 0


@pytest.mark.parametrize("frames", [4, 12])
def test_a_grid_that_follows_the_length_of_the_clip_is_approximate(frames: int) -> None:
    """Of two positions the corners lie three apart, by chance."""
    network, clip = made(
        Between(lambda y, x: F.interpolate(y, scale_factor=2, mode="trilinear", align_corners=True), 2), frames
    )
    stream = dissect.convert(network, clip, preset="exact")
    (row,) = stream.plan.approximate
    assert "follow the clip's length" in row.reason
    still = clip[:, :, :1].expand(-1, -1, 24, -1, -1)
    middle = slice(8, 16)
    out = stream.offline(still)[:, :, middle]
    assert torch.allclose(out, network(still)[:, :, middle], atol=1e-9)


@PRESETS
def test_pooled_over_the_clip_and_back(preset: str) -> None:
    """Image-level pooling: one vector for the clip, interpolated back onto every frame."""

    def middle(y: Tensor, x: Tensor) -> Tensor:
        pooled = F.adaptive_avg_pool3d(y, 1)
        return y + F.interpolate(pooled, size=y.shape[2:], mode="trilinear", align_corners=False)

    network, clip = made(Between(middle), 8)
    stream = dissect.convert(network, clip, preset=preset)
    dissect.verify(stream, network, runtime=False).check()
    assert not stream.plan.exact


@pytest.mark.parametrize(
    ("middle", "said"),
    [
        (lambda y, x: F.interpolate(y, scale_factor=2), "more outputs than it is given frames"),
        (lambda y, x: y.repeat_interleave(3, 2), "more outputs than it is given frames"),
        (lambda y, x: F.interpolate(y, scale_factor=(1.5, 1, 1), mode="trilinear"), "no whole factor"),
        (lambda y, x: F.interpolate(y, size=(5, 6, 5)), "no whole factor"),
        (
            lambda y, x: F.interpolate(y.mean(4), scale_factor=2, mode="bicubic").unsqueeze(-1),
            "bicubic interpolation over time",
        ),
    ],
)
@PRESETS
def test_what_cannot_be_streamed_is_refused_by_name(middle: Any, said: str, preset: str) -> None:
    network, clip = made(Between(middle), 8)
    with pytest.raises(NotStreamable, match=said):
        dissect.convert(network, clip, preset=preset)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "align"), MODES)
@pytest.mark.parametrize("factors", [(4, 2), (2, 0.5)], ids=str)
@PRESETS
def test_in_the_runtime(mode: str, align: bool | None, factors: tuple[int, float], preset: str) -> None:
    stride, scale = factors
    middle = lambda y, x: F.interpolate(y, scale_factor=(scale, 2, 1.5), mode=mode, align_corners=align)  # noqa: E731
    network, clip = made(Between(middle, stride), 16)
    dissect.verify(dissect.convert(network, clip, preset=preset), network).check()


class DoubleConv(nn.Sequential):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        for width in (channels, out):
            self.extend([nn.Conv3d(width, out, 3, padding=1, bias=False), nn.BatchNorm3d(out), nn.ReLU(inplace=True)])


class UNet(nn.Module):
    """A 3D U-Net: two max pools down, trilinear up, concatenated skips."""

    def __init__(self, by_size: bool) -> None:
        super().__init__()
        self.by_size = by_size
        self.pool = nn.MaxPool3d(2)
        self.first, self.second, self.third = DoubleConv(2, 3), DoubleConv(3, 6), DoubleConv(6, 8)
        self.fourth, self.fifth = DoubleConv(14, 6), DoubleConv(9, 3)
        self.out = nn.Conv3d(3, 2, 1)

    def up(self, x: Tensor, like: Tensor) -> Tensor:
        size = {"size": like.shape[2:]} if self.by_size else {"scale_factor": 2}
        return torch.cat([like, F.interpolate(x, mode="trilinear", align_corners=False, **size)], 1)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        second = self.second(self.pool(first))
        y = self.fourth(self.up(self.third(self.pool(second)), second))
        return torch.sigmoid(self.out(self.fifth(self.up(y, first))))


class Saliency(nn.Module):
    """In the style of TASED-Net: separable encoder, trilinear decoder over space and time, all frames into one map."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.separable(2, 4)
        self.second = self.separable(4, 6)
        self.pool = nn.MaxPool3d(3, 2, 1)
        self.last = nn.MaxPool3d((2, 1, 1), (2, 1, 1))
        self.up = nn.Sequential(nn.Conv3d(6, 4, 3, padding=1), nn.ReLU(), nn.Upsample(scale_factor=2, mode="trilinear"))
        self.map = nn.Sequential(
            nn.ConvTranspose3d(8, 3, (1, 4, 4), (1, 2, 2), (0, 1, 1), bias=False),
            nn.ReLU(),
            nn.Conv3d(3, 1, (4, 1, 1)),
            nn.Sigmoid(),
        )

    def separable(self, channels: int, out: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv3d(channels, out, (1, 3, 3), padding=(0, 1, 1), bias=False),
            nn.BatchNorm3d(out),
            nn.ReLU(),
            nn.Conv3d(out, out, (3, 1, 1), padding=(1, 0, 0), bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 1))
        y = self.first(x)
        z = self.last(self.second(self.pool(y)))
        z = F.interpolate(self.up(z), scale_factor=(2, 1, 1), mode="trilinear")
        return self.map(torch.cat([y, z], 1)).squeeze(1)


@pytest.mark.parametrize(
    ("build", "frames"),
    [(lambda: UNet(False), 8), (lambda: UNet(True), 12), (Saliency, 16)],
    ids=["U-Net", "U-Net by size", "saliency"],
)
@PRESETS
def test_networks(build: Callable[[], nn.Module], frames: int, preset: str) -> None:
    network, _ = made(build(), frames)
    clip = torch.rand(1, 2, frames, 8, 7 if build is Saliency else 8, dtype=torch.float64)
    stream = dissect.convert(network, clip, preset=preset)
    dissect.verify(stream, network).check()
    assert stream.plan.exact == (preset == "exact")
    if preset != "exact":
        assert stream.timing.delay == 0
