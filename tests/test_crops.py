"""Every so many frames of a cropped clip: which positions there are follows from both, whatever the clip's length."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from laws import Ranks, law, offline
from torch import Tensor, nn
from torch.nn import functional as F

import dissect
from dissect.lowering import lower
from dissect.squeezing import squeeze


class Run(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.function = nn.Sequential(*layers), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layers(x))


def cropped(x: Tensor) -> Tensor:
    return x[:, :, : x.shape[2] - 1 : 2]


@pytest.mark.parametrize("frames", [15, 16])
@pytest.mark.parametrize(
    "function",
    [
        lambda x: cropped(x)[:, :, -1],
        lambda x: (
            cropped(x).sum(2) if x.shape[2] > 14 else x[:, :, :0].sum(2) / 0
        ),  # a window is as long as the example
        lambda x: cropped(x),
        lambda x: x[:, :, 1 : x.shape[2] - 2 : 3],
    ],
)
def test_a_crop_smaller_than_the_step(function: Callable[[Tensor], Tensor], frames: int) -> None:
    torch.manual_seed(0)
    network = Run(function, nn.Conv3d(2, 3, 3, padding=1)).double()
    clip = torch.randn(1, 2, 16, 4, 4, dtype=torch.float64)
    stream = dissect.convert(network, clip[:, :, :frames], preset="exact")
    assert stream.plan.exact
    law(stream, clip[:, :, :9])
    assert offline(stream, network, clip, range(frames, 4, -1)) > 0


def test_a_position_that_need_not_be_the_newest_says_so() -> None:
    """Behind a gate of the whole clip: of a clip of another length, the last one that is taken is not its last frame."""

    def gated(x: Tensor) -> Tensor:
        return (x * x.mean(2, keepdim=True).sigmoid())[:, :, 1::2][:, :, -1]

    network = Run(gated).double()
    clip = torch.randn(1, 2, 8, 4, 4, dtype=torch.float64)
    stream = dissect.convert(network, clip, preset="exact")
    assert not stream.plan.exact
    dissect.verify(stream, network, runtime=False).check()


def test_a_padding_that_crops_the_end() -> None:
    """A shift by padding, then a convolution without padding: causal as it is."""
    torch.manual_seed(0)
    network = Run(lambda x: F.conv1d(F.pad(x.mean((3, 4)), (3, -1)), torch.ones(2, 2, 3).double()).flatten(1)).double()
    clip = torch.randn(1, 2, 8, 4, 4, dtype=torch.float64)
    stream = dissect.convert(network, clip, preset="causal")
    report = dissect.verify(stream, network, runtime=False).check()
    assert any("shifted" in row.pair and row.error is not None for row in report.rows)


def test_any_activation_of_what_kept_a_dimension_of_time_is_of_rank_four() -> None:
    def both(x: Tensor) -> Tensor:
        pair = torch.cat([F.avg_pool3d(x, (3, 1, 1)), x[:, :, 2::3]], 1)
        return torch.cat([F.hardswish(pair), x[:, :, 2::3]], 1).flatten(1)

    network = Run(both).double()
    clip = torch.randn(1, 2, 3, 4, 4, dtype=torch.float64)
    stream = dissect.convert(network, clip, preset="exact")
    module = lower(stream, torch.float64)
    squeeze(module, [*stream.frame((clip,), 0), *stream.caches(1)])
    recorder = Ranks(module)
    recorder.run(clip[:, :, 0], *stream.caches(1))
    assert recorder.highest <= 4
