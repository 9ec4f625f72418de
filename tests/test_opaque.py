"""Whole modules as opaque per-frame units."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import dissect
from dissect.opaque import OPAQUE


class Branching(nn.Module):
    """No graph can hold this: it branches on the values of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * 2 if x.abs().sum() > 1e9 else self.conv(x)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.unit, self.last = nn.Conv3d(3, 4, 3, padding=1), Branching(), nn.Conv3d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        b, c, t, h, w = x.shape
        x = self.unit(x.transpose(1, 2).reshape(b * t, c, h, w)).view(b, t, 6, h, w).transpose(1, 2)
        return self.last(x).mean((2, 3, 4))


@pytest.fixture
def marked() -> Iterator[None]:
    dissect.per_frame(Branching)
    yield
    OPAQUE.discard(Branching)


def network() -> Network:
    torch.manual_seed(0)
    return Network().double().eval()


CLIP = torch.rand(1, 3, 6, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_without_a_mark_the_branch_is_refused() -> None:
    with pytest.raises(dissect.CaptureError, match="branches on the values"):
        dissect.convert(network(), CLIP)


@pytest.mark.parametrize("preset", ["exact", "causal", "d3d"])
def test_a_marked_module_is_called_as_it_is(marked: None, preset: str) -> None:
    model = network()
    stream = dissect.convert(model, CLIP, preset=preset)
    dissect.verify(stream, runtime=False).check()
    assert set(stream.clip.state_dict()) == set(model.state_dict())
    assert "forward" not in model.unit.__dict__
    if preset == "exact":
        with torch.no_grad():
            assert torch.allclose(stream.offline(CLIP)[..., -1], model(CLIP), rtol=0, atol=1e-12)


def test_only_classes_of_modules_can_be_marked() -> None:
    with pytest.raises(TypeError, match="class of modules"):
        dissect.per_frame(len)  # type: ignore[type-var]
