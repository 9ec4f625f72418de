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
