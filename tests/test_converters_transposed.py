"""Transposed convolutions over space and time, against the network as it is."""

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

#: kernel, stride, padding, output padding, dilation in time
SETTINGS = [
    (2, 2, 0, 0, 1),
    (3, 2, 1, 1, 1),
    (3, 2, 1, 0, 1),
    (4, 2, 1, 0, 1),
    (4, 2, 2, 1, 1),
    (2, 2, 1, 0, 1),  # takes away positions at the end of the clip
    (3, 2, 0, 0, 2),
    (3, 2, 3, 1, 3),
    (1, 2, 0, 1, 1),
    (2, 3, 0, 0, 1),  # one position in three has its bias alone
    (5, 3, 1, 2, 1),
    (4, 4, 0, 0, 1),
    (3, 1, 1, 0, 1),
    (4, 1, 0, 0, 1),
    (3, 1, 2, 0, 1),
    (2, 1, 1, 0, 3),
]


class Decoder(nn.Module):
    """A strided convolution, a transposed one, and one that sees what is left and right of it."""

    def __init__(
        self, kernel: int, stride: int, padding: int, extra: int, dilation: int, groups: int = 1, bias: bool = True
    ) -> None:
        super().__init__()
        self.down = nn.Conv3d(2, 4, 3, (stride, 2, 2), 1)
        self.up = nn.ConvTranspose3d(
            4, 4, (kernel, 3, 2), (stride, 2, 2), (padding, 1, 0), (extra, 1, 0), groups, bias, (dilation, 1, 1)
        )
        self.last = nn.Conv3d(4, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.leaky_relu(self.up(F.relu(self.down(x)))))


def made(network: nn.Module, frames: int, channels: int = 2) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    return network.double().eval(), torch.randn(1, channels, frames, 6, 6, dtype=torch.float64)


def equal(network: nn.Module, clip: Tensor) -> Any:
    """An exact stream, by the law and against the original at several lengths."""
    stream = dissect.convert(network, clip, preset="exact")
    assert stream.plan.exact, str(stream.plan)
    law(stream, torch.randn(2, *clip.shape[1:2], 11, *clip.shape[3:], dtype=torch.float64))
    frames = clip.shape[2]
    assert offline(stream, network, clip, [frames, frames - 1, frames - 2, frames - 5]) > 1
    return stream


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_exact_by_phases(settings: tuple[int, ...], groups: int) -> None:
    equal(*made(Decoder(*settings, groups=groups, bias=groups == 1), 12))


@pytest.mark.parametrize("settings", SETTINGS[::2], ids=str)
def test_at_a_stride(settings: tuple[int, ...]) -> None:
    """Two strides before and one transposed convolution: its positions lie two frames apart."""

    class Deep(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Conv3d(2, 2, 3, (2, 1, 1), 1), nn.ReLU(), Decoder(*settings))

    equal(*made(Deep(), 17))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("preset", ["causal", "d3d"])
def test_without_delay_by_a_mean_of_the_phases(settings: tuple[int, ...], preset: str) -> None:
    """Of a still scene it gives, at once and away from the edges, the mean of what the original gives in turn."""
    whole = Decoder(*settings, groups=2)
    network, clip = made(nn.Sequential(whole.down, nn.ReLU(), whole.up), 12)
    stream = dissect.convert(network, clip, preset=preset)
    dissect.verify(stream, network, runtime=False).check()
    assert stream.timing.delay == 0
    still = clip[:, :, :1].expand(-1, -1, 72, -1, -1)
    stride = settings[1]
    wanted = network(still)[:, :, 8 * stride : 9 * stride].mean(2)
    close(stream.clip(still)[:, :, -1], wanted)
    (row,) = [row for row in stream.plan.approximate if row.path == "2"]
    assert row.reason


@pytest.mark.parametrize("preset", ["causal", "d3d"])
def test_depth_says_how_many_positions_are_kept(preset: str) -> None:
    network, clip = made(Decoder(5, 2, 1, 0, 1), 12)
    stream = dissect.convert(network, clip, preset=preset, overrides={"up": {"depth": 2}})
    assert stream.clip.up.weight.shape[2] == 2
    dissect.verify(stream, network, runtime=False).check()


@pytest.mark.parametrize(
    "layer",
    [
        nn.ConvTranspose2d(2, 3, 3, 2, 1, 1),
        nn.ConvTranspose2d(2, 4, (2, 3), (2, 1), 0, 0, 2, bias=False),
        nn.ConvTranspose2d(2, 3, 3, 1, 2, dilation=2),
    ],
)
@PRESETS
def test_inside_a_frame_nothing_changes(layer: nn.Module, preset: str) -> None:
    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], -1)).transpose(1, 2)

    network, clip = made(Frames(), 7)
    stream = dissect.convert(network, clip, preset=preset)
    dissect.verify(stream, network).check()
    assert stream.plan.exact
    assert not stream.cache_list


@PRESETS
def test_kernel_in_space_only(preset: str) -> None:
    network, clip = made(nn.ConvTranspose3d(2, 3, (1, 3, 3), (1, 2, 2)), 7)
    stream = dissect.convert(network, clip, preset=preset)
    dissect.verify(stream, network, runtime=False).check()
    assert stream.plan.exact


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("settings", SETTINGS[1:9:3], ids=str)
def test_frame_features_without_space(groups: int, settings: tuple[int, ...]) -> None:
    kernel, stride, padding, extra, dilation = settings

    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Conv1d(2, 4, 3, stride, 1, groups=groups)
            self.up = nn.ConvTranspose1d(4, 2, kernel, stride, padding, extra, groups, dilation=dilation)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.down(x.mean((3, 4))))

    network, clip = made(Features(), 12)
    equal(network, clip)
    dissect.verify(dissect.convert(network, clip, preset="exact"), network).check()


def test_weights_that_two_layers_share() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Conv3d(2, 2, 3, (4, 1, 1), 1)
            self.up = nn.ConvTranspose3d(2, 2, (2, 1, 1), (2, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.up(F.relu(self.up(self.down(x))))

    network, clip = made(Shared(), 12)
    equal(network, clip)
    for preset in ("causal", "d3d"):
        dissect.verify(dissect.convert(network, clip, preset=preset), network, runtime=False).check()


def test_other_forms_of_the_operator() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Conv3d(2, 3, 3, (2, 1, 1), 1)
            self.weight = nn.Parameter(torch.empty(3, 2, 4, 1, 1))
            self.bias = nn.Parameter(torch.empty(2))

        def forward(self, x: Tensor) -> Tensor:
            y = self.down(x)
            return torch.convolution(y, self.weight, self.bias, (2, 1, 1), (1, 0, 0), (1, 1, 1), True, (0, 0, 0), 1)

    equal(*made(Functional(), 12))


@PRESETS
def test_more_outputs_than_frames_are_refused(preset: str) -> None:
    network, clip = made(nn.ConvTranspose3d(2, 2, (2, 1, 1), (2, 1, 1)), 6)
    with pytest.raises(NotStreamable, match="more outputs than it is given frames"):
        dissect.convert(network, clip, preset=preset)


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("groups", [1, 2])
@PRESETS
def test_in_the_runtime(settings: tuple[int, ...], groups: int, preset: str) -> None:
    network, clip = made(Decoder(*settings, groups=groups), 12)
    dissect.verify(dissect.convert(network, clip, preset=preset), network).check()


class UNet(nn.Module):
    """A 3D U-Net of valid convolutions with a transposed decoder; its skip connection is cropped to fit."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = self.level(2, 3), self.level(3, 6)
        self.up = nn.ConvTranspose3d(6, 3, 2, 2)
        self.last = self.level(6, 3)
        self.out = nn.Conv3d(3, 2, 1)

    def level(self, channels: int, out: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv3d(channels, out, 3, padding=(0, 1, 1)),
            nn.ReLU(),
            nn.Conv3d(out, out, 3, padding=(0, 1, 1)),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        skip = self.first(x)
        y = self.up(self.second(F.max_pool3d(skip, 2)))
        crop = (skip.shape[2] - y.shape[2]) // 2
        return self.out(self.last(torch.cat([skip[:, :, crop : crop + y.shape[2]], y], 1)))


class Autoencoder(nn.Module):
    """A memory-less autoencoder for anomaly detection, all of it strided and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            *self.layer(nn.Conv3d(2, 4, 3, (1, 2, 2), 1)),
            *self.layer(nn.Conv3d(4, 4, 3, 2, 1)),
            *self.layer(nn.Conv3d(4, 6, 3, (2, 1, 1), 1)),
        )
        self.decoder = nn.Sequential(
            *self.layer(nn.ConvTranspose3d(6, 4, 3, (2, 1, 1), 1, (1, 0, 0))),
            *self.layer(nn.ConvTranspose3d(4, 4, 3, 2, 1, (1, 0, 0))),
            nn.ConvTranspose3d(4, 2, 3, (1, 2, 2), 1, (0, 1, 1)),
        )

    def layer(self, conv: nn.Module) -> list[nn.Module]:
        return [conv, nn.BatchNorm3d(int(conv.out_channels)), nn.LeakyReLU(0.2, inplace=True)]  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


class PhysNet(nn.Module):
    """Remote pulse in the style of PhysNet: two strides in time, two transposed convolutions, a signal."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            *[nn.Conv3d(2, 4, (1, 5, 5), padding=(0, 2, 2)), nn.BatchNorm3d(4), nn.ReLU(True)],
            *[
                nn.MaxPool3d(2),
                nn.Conv3d(4, 4, 3, padding=1),
                nn.BatchNorm3d(4),
                nn.ReLU(True),
                nn.MaxPool3d((2, 1, 1)),
            ],
        )
        self.up = nn.Sequential(self.doubled(), self.doubled())
        self.signal = nn.Conv3d(4, 1, 1)

    def doubled(self) -> nn.Sequential:
        return nn.Sequential(nn.ConvTranspose3d(4, 4, (4, 1, 1), (2, 1, 1), (1, 0, 0)), nn.BatchNorm3d(4), nn.ELU())

    def forward(self, x: Tensor) -> Tensor:
        y = F.adaptive_avg_pool3d(self.up(self.encoder(x)), (x.shape[2], 1, 1))
        return self.signal(y).view(x.shape[0], x.shape[2])


@pytest.mark.parametrize(("build", "frames"), [(UNet, 20), (Autoencoder, 8), (PhysNet, 16)])
@PRESETS
def test_networks(build: Callable[[], nn.Module], frames: int, preset: str) -> None:
    network, clip = made(build(), frames)
    clip = F.interpolate(clip, size=(frames, 8, 8))
    stream = dissect.convert(network, clip, preset=preset)
    dissect.verify(stream, network).check()
    assert stream.plan.exact == (preset == "exact")
    if preset != "exact":
        assert stream.timing.delay == 0
