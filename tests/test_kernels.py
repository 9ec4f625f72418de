"""Convolutions whose kernels the clip gives: a kernel for each clip, or for each of its frames."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dissect

PRESETS = ("exact", "causal", "d3d")
CLIP = (1, 3, 5, 7, 8)


class Mixed(nn.Module):
    """CondConv: the clip's average weighs kernels, and each clip is convolved with its own sum of them."""

    def __init__(self, groups: int = 1, padding: int | str = 1, stride: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 8, 3, padding=1)
        self.kernels = nn.Parameter(torch.randn(3, 8, 8 // groups, 3, 3, 3) * 0.2)
        self.biases = nn.Parameter(torch.randn(3, 8)) if bias else None
        self.router = nn.Linear(8, 3)
        self.options = {"padding": padding, "stride": stride, "groups": groups}

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        shares = torch.softmax(self.router(x.mean((2, 3, 4))), 1)
        rows, channels, *sizes = x.shape
        kernel = (shares @ self.kernels.flatten(1)).view(-1, *self.kernels.shape[2:])
        bias = None if self.biases is None else (shares @ self.biases).view(-1)
        options = {**self.options, "groups": rows * self.options["groups"]}
        y = F.conv3d(x.reshape(1, rows * channels, *sizes), kernel, bias, **options)
        return y.view(rows, -1, *y.shape[2:]).relu().mean((2, 3, 4))


class Calibrated(nn.Module):
    """TAdaConv: a kernel for each frame, out of a shared one and what the frame and its neighbours show."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 6, 3, padding=1)
        self.kernel = nn.Parameter(torch.randn(1, 1, 5, 6, 3, 3) * 0.2)
        self.route = nn.Conv1d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        rows, channels, frames, high, wide = x.shape
        scale = self.route(x.mean((3, 4))).sigmoid().transpose(1, 2).reshape(rows, frames, 1, channels, 1, 1)
        kernel = (scale * self.kernel).reshape(-1, channels, 3, 3)
        merged = x.transpose(1, 2).reshape(1, -1, high, wide)
        y = F.conv2d(merged, kernel, padding=1, groups=rows * frames)
        return y.view(rows, frames, -1, high, wide).mean((3, 4))


class Correlated(nn.Module):
    """A tracker: the middle of the first frame's features is the kernel for all frames."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        rows, _, frames, high, wide = x.shape
        y = self.trunk(x.transpose(1, 2).flatten(0, 1)).view(rows, frames, 8, high, wide)
        kernel = y[:, :1, :, 2:5, 2:6].expand(-1, frames, -1, -1, -1).reshape(-1, 1, 3, 4)
        z = F.conv2d(y.reshape(1, -1, high, wide), kernel, groups=rows * frames * 8)
        return z.view(rows, frames, 8, *z.shape[2:]).sum(2)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "build",
    [
        Mixed,
        lambda: Mixed(2, padding=0, bias=False),
        lambda: Mixed(8, padding="same"),
        lambda: Mixed(stride=2),
        Calibrated,
        Correlated,
    ],
    ids=["dense", "grouped", "depthwise", "strided", "a kernel a frame", "correlation"],
)
def test_a_kernel_from_the_clip(build: type[nn.Module], preset: str) -> None:
    torch.manual_seed(0)
    network = build().double().eval()
    stream = dissect.convert(network, torch.randn(CLIP, dtype=torch.float64), preset=preset)
    dissect.verify(stream, network, runtime=preset == "exact").check()
    if preset == "exact":
        assert stream.plan.exact, str(stream.plan)


def test_a_kernel_for_the_whole_batch_is_refused() -> None:
    """Nothing tells whose it is."""

    class Shared(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            kernel = x.mean((2, 3, 4)).mean(0).view(1, 3, 1, 1, 1)
            return F.conv3d(x, kernel)

    with pytest.raises(dissect.NotStreamable, match="batch"):
        dissect.convert(Shared(), torch.randn(CLIP))
