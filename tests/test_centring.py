"""Centring: where the original's positions lie, found by poking a frame and looking where the middle tap answers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dissect
from dissect.centring import centres


def weight(size: int) -> Tensor:
    """A kernel over time with its middle tap alone."""
    kernel = torch.zeros(1, 1, size, 1, 1)
    kernel[0, 0, size // 2] = 1.0
    return kernel


class Net(nn.Module):
    def __init__(self, forward: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


def strided(x: Tensor) -> Tensor:
    x = F.conv3d(x, weight(3), stride=(2, 1, 1), padding=(1, 0, 0))
    return F.conv3d(x, weight(5), stride=(2, 1, 1), padding=(2, 0, 0))


NETS = {
    "padded": lambda x: F.conv3d(x, weight(3), padding=(1, 0, 0)),
    "valid": lambda x: F.conv3d(x, weight(3)),
    "valid and dilated": lambda x: F.conv3d(x, weight(3), dilation=(2, 1, 1)),
    "overpadded": lambda x: F.conv3d(x, weight(3), padding=(2, 0, 0)),
    "strided": strided,
    "valid, strided": lambda x: F.conv3d(F.conv3d(x, weight(3), stride=(2, 1, 1)), weight(3), stride=(2, 1, 1)),
    "cropped": lambda x: F.conv3d(x, weight(3), padding=(1, 0, 0))[:, :, 2:],
    "branches": lambda x: torch.cat([F.conv3d(x, weight(3), padding=(1, 0, 0)), F.conv3d(x, weight(1))], 1),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("preset", ["d3d", "causal"])
def test_position_i_answers_to_the_frame_that_it_is_centred_on(name: str, preset: str) -> None:
    net = Net(NETS[name])
    stream = dissect.convert(net, torch.zeros(1, 1, 12, 1, 1), preset=preset)
    (centre,) = centres(stream.dissected).values()
    value = stream.dissected.outputs[0].value
    assert value is not None
    for frame in range(12):
        clip = torch.zeros(1, 1, 12, 1, 1)
        clip[0, 0, frame] = 1.0
        for position in net(clip)[0, 0].flatten().nonzero().flatten().tolist():
            assert centre + position * value.clock.removed == frame
