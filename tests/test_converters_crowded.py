"""Rows that carry more than the batch: pixels, views and persons merged with it, under layers that expect channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from random_networks import scrambled
from torch import Tensor, nn

import dissect

PRESETS = ["d3d", "causal", "exact"]


class Crowd(nn.Module):
    """A temporal convolution, so that frames differ, and then ``arrange``: how the layers see the volume."""

    def __init__(self, arrange: Callable[[Tensor, nn.Module], Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.arrange = arrange
        self.stem = nn.Conv3d(2, 3, (3, 1, 1), padding=(1, 0, 0))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.arrange(self.stem(x), self.layers)


def pixels(x: Tensor, layers: nn.Module) -> Tensor:
    """``(N * H * W, C, T)``."""
    n, c, t, h, w = x.shape
    y = layers(x.permute(0, 3, 4, 1, 2).reshape(n * h * w, c, t))
    return y.view(n, h, w, *y.shape[1:]).permute(0, 3, 4, 1, 2)


def lines(x: Tensor, layers: nn.Module) -> Tensor:
    """``(N * H, C, T, W)``, as graphs of joints have their persons."""
    n, c, t, h, w = x.shape
    y = layers(x.permute(0, 3, 1, 2, 4).reshape(n * h, c, t, w))
    return y.view(n, h, *y.shape[1:]).permute(0, 2, 3, 1, 4)


def views(x: Tensor, layers: nn.Module) -> Tensor:
    """``(N * 2, C, T, H, W)``: two crops, their scores averaged."""
    n, c, t, h, w = x.shape
    y = layers(x.view(n, c, t, 2, h // 2, w).permute(0, 3, 1, 2, 4, 5).reshape(n * 2, c, t, h // 2, w))
    return y.view(n, 2, *y.shape[1:]).mean(1)


def frames(x: Tensor, layers: nn.Module) -> Tensor:
    """``(N * T * 2, C, H, W)``: two crops of every frame in a 2D trunk."""
    n, c, t, h, w = x.shape
    y = layers(x.view(n, c, t, 2, h // 2, w).permute(0, 2, 3, 1, 4, 5).reshape(n * t * 2, c, h // 2, w))
    return y.view(n, t, 2, *y.shape[1:]).mean(2)


class Last(nn.Module):
    """A recurrence's outputs, time back behind the features."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x.transpose(1, 2))[0]
        return out.transpose(1, 2)


CASES: dict[str, tuple[Any, ...]] = {
    "pixels": (pixels, nn.Conv1d(3, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU(), nn.MaxPool1d(2)),
    "depthwise": (pixels, nn.Conv1d(3, 3, 3, padding=1, stride=2, groups=3, bias=False)),
    "upwards": (pixels, nn.Conv1d(3, 3, 2, 2), nn.ConvTranspose1d(3, 4, 2, 2)),
    "recurrent": (pixels, Last(nn.GRU(3, 5, batch_first=True))),
    "linear": (pixels, nn.Linear(8, 5)),
    "group norm": (pixels, nn.GroupNorm(3, 3)),
    "lines": (
        lines,
        nn.Conv2d(3, 4, (5, 1), (2, 1), (2, 0)),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
    ),
    "lines upwards": (lines, nn.MaxPool2d((2, 1)), nn.ConvTranspose2d(3, 4, 2, 2)),
    "views": (views, nn.Conv3d(3, 4, 3, 2, 1), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 4, 3, padding=1, groups=2)),
    "instance norm": (views, nn.Conv3d(3, 4, 3, 2, 1), nn.InstanceNorm3d(4, affine=True), nn.ReLU()),
    "frames": (frames, nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.ReflectionPad2d(1)),
    "shuffled": (frames, nn.InstanceNorm2d(3), nn.Conv2d(3, 4, 1), nn.PixelShuffle(2), nn.ConvTranspose2d(1, 2, 2, 2)),
}


#: in every preset on every run; the others in `exact` alone
ALWAYS = ("pixels", "recurrent", "views", "frames")


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        pytest.param(name, preset, marks=[] if preset == "exact" or name in ALWAYS else pytest.mark.slow)
        for name in CASES
        for preset in PRESETS
    ],
)
def test_keeps_its_promises(name: str, preset: str) -> None:
    arrange, *layers = CASES[name]
    model = scrambled(Crowd(arrange, *layers), 0)
    size = 2 if arrange in (pixels, lines) else 4
    clip = torch.rand(1, 2, 8, size, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stream = dissect.convert(model, clip, preset=preset)
    dissect.verify(stream, model, runtime=preset == "exact").check()
    assert set(stream.clip.state_dict()) == set(model.state_dict())
    if preset == "exact":
        assert stream.plan.exact == ("norm" not in name)
