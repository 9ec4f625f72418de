"""Running means that a network divides by a count of its own, and frames as the channels of a convolution."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from laws import close, offline, streamed
from random_networks import scrambled
from torch import Tensor, nn

import dissect

PRESETS = pytest.mark.parametrize("preset", ["d3d", "causal", "exact"])


def numbers(x: Tensor) -> Tensor:
    return torch.arange(1, x.shape[2] + 1, dtype=x.dtype)


MEANS: dict[str, Callable[[Tensor], Tensor]] = {
    "a view": lambda x: x.cumsum(2) / numbers(x).view(1, 1, -1, 1, 1),
    "expanded": lambda x: x.cumsum(2) / numbers(x)[None, None, :, None, None].expand(x.shape),
    "counted by a sum": lambda x: x.cumsum(2) / torch.ones_like(x).cumsum(2),
    "counted in entries": lambda x: (
        x.cumsum(2) * 3 / torch.arange(3, 3 * x.shape[2] + 1, 3, dtype=x.dtype).view(-1, 1, 1)
    ),
    "divide": lambda x: torch.divide(torch.cumsum(x, 2), numbers(x).reshape(-1, 1, 1)),
}


class Squeezed(nn.Module):
    """A squeeze over the frames so far, as in MoViNet's causal networks."""

    def __init__(self, mean: Callable[[Tensor], Tensor], stride: int) -> None:
        super().__init__()
        self.first, self.weigh = nn.Conv3d(2, 4, 3, (stride, 1, 1), 1), nn.Conv3d(4, 4, 1)
        self.last = nn.Conv3d(4, 3, (3, 1, 1), padding=(1, 0, 0))
        self.mean = mean

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        gate = self.weigh(self.mean(x.mean((3, 4), keepdim=True))).sigmoid()
        return self.last(x * gate).mean((3, 4))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", MEANS)
def test_a_running_mean_goes_on_beyond_the_example(name: str, stride: int) -> None:
    torch.manual_seed(0)
    network = Squeezed(MEANS[name], stride).double().eval()
    clip = torch.randn(1, 2, 30, 4, 4, dtype=torch.float64)
    stream = dissect.convert(network, clip[:, :, :8], "exact")
    assert stream.plan.exact
    assert offline(stream, network, clip, (3, 8, 9, 16, 30)) == 5
    dissect.verify(stream, network).check()


def test_other_numbers_are_no_count() -> None:
    """Divided by what stands at a place of the clip: that has no meaning beyond it."""
    network = Squeezed(lambda x: x / (numbers(x) + 1).view(1, 1, -1, 1, 1), 1).double().eval()
    stream = dissect.convert(network, torch.randn(1, 2, 8, 4, 4, dtype=torch.float64), "exact")
    assert not stream.plan.exact
    dissect.verify(stream, network, runtime=False).check()


class Weighed(nn.Module):
    """A weight for each frame: frames are the channels of a convolution (PoseFormer's mean)."""

    def __init__(self, frames: int) -> None:
        super().__init__()
        self.each, self.mean = nn.Linear(4, 6), nn.Conv1d(frames, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.mean(self.each(x))
        return out.flatten(1)


@pytest.mark.parametrize("preset", ["exact", "causal", "d3d"])
def test_frames_as_channels(preset: str) -> None:
    network, x = Weighed(7).double().eval(), torch.randn(1, 7, 4, dtype=torch.float64)
    stream = dissect.convert(network, x, preset, time_dim=1)
    dissect.verify(stream, network).check()
    assert preset != "exact" or stream.timing.delay == 6


class Swapped(nn.Module):
    """A kernel as long as the clip, then channels as the depth of a volume with one channel (SSRN, of hyperspectral bands)."""

    def __init__(self) -> None:
        super().__init__()
        self.bands, self.volume, self.fc = nn.Conv3d(3, 6, (8, 1, 1)), nn.Conv3d(1, 4, (6, 3, 3)), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bands(x)).permute(0, 2, 1, 3, 4)
        return self.fc(F.relu(self.volume(x)).mean((2, 3, 4)))


@PRESETS
def test_channels_as_the_depth_of_a_volume(preset: str) -> None:
    model = scrambled(Swapped(), 0)
    clip = torch.rand(1, 3, 8, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stream = dissect.convert(model, clip, preset=preset)
    dissect.verify(stream, model, runtime=preset == "exact").check()
    if preset == "exact":
        assert stream.plan.exact
        close(streamed(stream, clip, frames=8), model(clip))
