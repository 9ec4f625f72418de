"""Concatenation: positions side by side among features, rows of a batch in a loop, tokens that are constants."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from laws import close, law, streamed
from random_networks import scrambled
from torch import Tensor, nn

import dissect
from dissect.errors import NotStreamable

PRESETS = pytest.mark.parametrize("preset", ["d3d", "causal", "exact"])
CLIP = torch.rand(1, 3, 8, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Pyramid(nn.Module):
    """Pools to one, two and four positions, flattened and put side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, 3, padding=1)
        self.fc = nn.Linear(4 * 7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.fc(torch.cat([F.adaptive_avg_pool3d(x, (n, 1, 1)).flatten(1) for n in (1, 2, 4)], 1))


@PRESETS
def test_a_pyramid_over_time(preset: str) -> None:
    model = scrambled(Pyramid(), 0)
    stream = dissect.convert(model, CLIP, preset=preset)
    dissect.verify(stream, model, runtime=preset == "exact").check()
    if preset == "exact":
        assert stream.plan.exact
        close(streamed(stream, CLIP, frames=8), model(CLIP))


class Rows(nn.Module):
    """A loop over the rows of the batch, each averaged over its own length."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, (3, 1, 1), padding=(1, 0, 0))
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        lengths = [x.shape[2]] * x.shape[0]
        x = self.conv(x).mean((3, 4))
        return self.fc(torch.cat([x[row][:, :length].mean(1).unsqueeze(0) for row, length in enumerate(lengths)], 0))


@PRESETS
def test_a_loop_over_the_rows_of_a_batch(preset: str) -> None:
    """Captured for one row, the loop is none; every row of the stream goes the same way."""
    model = scrambled(Rows(), 0)
    stream = dissect.convert(model, CLIP, preset=preset)
    law(stream, CLIP.repeat(3, 1, 1, 1, 1) * torch.rand(3, 1, 8, 1, 1, dtype=torch.float64))
    dissect.verify(stream, model, runtime=preset == "exact").check()
    with pytest.raises(NotStreamable, match="one row of the batch"):
        dissect.convert(model, CLIP.repeat(2, 1, 1, 1, 1), preset=preset)


class Levels(nn.Module):
    """A pyramid over time whose levels stand behind one another on the axis of time, as detectors of actions have them."""

    def __init__(self, end: str) -> None:
        super().__init__()
        self.end = end
        self.first = nn.Conv3d(3, 4, 3, padding=1)
        self.down = nn.ModuleList(nn.Conv1d(4, 4, 3, 2, 1) for _ in range(2))
        self.head, self.fc = nn.Conv1d(4, 3, 3, padding=1), nn.Linear(4 * 14, 5)

    def forward(self, x: Tensor) -> Tensor:
        levels = [self.first(x).mean((3, 4))]
        for down in self.down:
            levels.append(F.relu(down(levels[-1])))
        if self.end == "flat":
            return self.fc(torch.cat(levels, 2).flatten(1))
        heads = torch.cat([self.head(level) for level in levels], 2)
        return heads.transpose(1, 2) if self.end == "levels" else heads.amax(2)


class Decoder(nn.Module):
    """Skips of an encoder that a decoder puts behind its own frames, with kernels as long as what is there (ViNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Conv3d(c, 4, 3, (2, 1, 1), 1) for c in (3, 4, 4))
        self.join, self.end = nn.Conv3d(4, 4, (3, 3, 3), (3, 1, 1), (0, 1, 1)), nn.Conv3d(4, 2, (5, 1, 1), (5, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for down in self.down:
            x = F.relu(down(x))
            skips.append(x)
        x = F.relu(self.join(torch.cat((skips[2], skips[1]), 2)))
        return self.end(torch.cat((x, skips[0]), 2)).squeeze(2)


class Summaries(nn.Module):
    """A few entries drawn from the whole clip, in front of its frames or behind them, convolved together."""

    def __init__(self, front: bool) -> None:
        super().__init__()
        self.front = front
        self.features, self.queries = nn.Conv3d(3, 4, 1), nn.Parameter(torch.randn(1, 3, 4))
        self.mixed, self.fc = nn.Conv1d(4, 4, 3, padding=1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).mean((3, 4)).transpose(1, 2)
        entries = (self.queries @ x.transpose(1, 2)).softmax(-1) @ x
        x = torch.cat([entries, x] if self.front else [x, entries], 1)
        return self.fc(self.mixed(x.transpose(1, 2)).mean(2))


BEHIND = {
    "levels": lambda: Levels("levels"),
    "the largest of all levels": lambda: Levels("largest"),
    "levels flattened": lambda: Levels("flat"),
    "a decoder": Decoder,
    "entries in front": lambda: Summaries(True),
    "entries behind": lambda: Summaries(False),
}


@PRESETS
@pytest.mark.parametrize("name", BEHIND)
def test_two_that_go_on_with_the_stream_behind_each_other(name: str, preset: str) -> None:
    """Both are windows of their positions: where the clip ends, all are there."""
    model = scrambled(BEHIND[name](), 0)
    stream = dissect.convert(model, CLIP, preset=preset)
    dissect.verify(stream, model, runtime=name in ("levels", "a decoder")).check()
    if preset == "exact":
        assert stream.plan.exact
        other = torch.rand(CLIP.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        close(streamed(stream, other, frames=8), model(other))
