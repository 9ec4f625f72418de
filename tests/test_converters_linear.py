"""Linear layers over flattened time: exact at the clip's end, a window of the past where frames meet what they give."""

from __future__ import annotations

import pytest
import torch
from laws import close, law, offline, streamed
from random_networks import scrambled
from torch import Tensor, nn

import dissect

CLIP = torch.rand(1, 3, 6, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Weighed(nn.Module):
    """A linear layer over all positions of a feature; with ``back`` it weighs every frame."""

    def __init__(self, back: bool) -> None:
        super().__init__()
        self.back = back
        self.conv = nn.Conv3d(3, 4, 3, padding=1)
        self.score = nn.Conv1d(4, 1, 3, padding=1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        y = self.fc(self.score(x.mean((3, 4))).squeeze(1))
        return x.mean((3, 4)) * y[:, :, None] if self.back else y


def test_the_clips_end_is_exact() -> None:
    model = scrambled(Weighed(False), 0)
    stream = dissect.convert(model, CLIP, preset="exact")
    assert stream.plan.exact
    law(stream, CLIP)
    assert offline(stream, model, CLIP, [6]) == 1


def test_frames_that_meet_it_see_a_window_of_the_past() -> None:
    model = scrambled(Weighed(True), 0)
    stream = dissect.convert(model, CLIP, preset="exact")
    row = next(row for row in stream.plan if row.path == "fc")
    assert row.verdict == "approximate"
    assert "window of the past" in row.reason
    assert "wait" not in row.reason  # only pools can
    assert stream.timing.delay == 2, "frames do not wait for the window's other end"
    law(stream, CLIP)
    close(streamed(stream, CLIP, frames=6)[:, :, -1], model(CLIP)[:, :, -1])


@pytest.mark.parametrize("preset", ["causal", "d3d"])
def test_other_presets_keep_the_law(preset: str) -> None:
    for back in (False, True):
        stream = dissect.convert(scrambled(Weighed(back), 0), CLIP, preset=preset)
        assert stream.timing.delay == 0
        law(stream, CLIP)


class Excited(nn.Module):
    """Linear layers over time give each position of the clip a weight of its own, by which it is multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, 3, padding=1)
        self.excite = nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 6), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return (x * self.excite(x.mean((1, 3, 4)))[:, None, :, None, None]).mean((3, 4))


@pytest.mark.parametrize("preset", ["causal", "d3d", "exact"])
def test_a_weight_for_each_position(preset: str) -> None:
    model = scrambled(Excited(), 0)
    stream = dissect.convert(model, CLIP, preset=preset)
    dissect.verify(stream, model, runtime=preset == "exact").check()
    row = next(row for row in stream.plan if row.placed)
    assert row.verdict == "approximate"
    if preset == "exact":
        assert stream.timing.delay == 1
        close(streamed(stream, CLIP, frames=6)[:, :, -1], model(CLIP)[:, :, -1])
