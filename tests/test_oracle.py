"""The oracles against definitions written out by hand: a still scene without edges, and kernels shifted into the past."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from laws import close
from random_networks import scrambled
from torch import Tensor, nn

import dissect
from dissect import oracle

CLIP = torch.randn(1, 2, 9, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def run(kind: type, model: nn.Module, clip: Tensor) -> Tensor:
    trace = dissect.convert(model, clip, preset="causal").dissected.trace
    (out,) = kind(oracle.original(model, (clip,)), trace).run(clip)
    return out


def convolution(kernel: int = 3, pad: int = 1, stride: int = 1, gap: int = 1) -> nn.Conv3d:
    return nn.Conv3d(2, 3, (kernel, 3, 3), (stride, 1, 1), (pad, 1, 1), (gap, 1, 1))


STILL: dict[str, nn.Module] = {
    "padded convolution": convolution(),
    "wide padding": convolution(5, 4),
    "strided and dilated": convolution(3, 2, 2, 2),
    "zero padding apart": nn.Sequential(nn.ConstantPad3d((0, 0, 0, 0, 2, 1), 0.0), convolution(3, 0)),
    "padded maximum": nn.Sequential(nn.MaxPool3d((3, 1, 1), 1, (1, 0, 0)), convolution()),
    "padded mean": nn.AvgPool3d((3, 1, 1), 1, (1, 0, 0)),
    "two layers": nn.Sequential(convolution(), nn.Sigmoid(), nn.Conv3d(3, 2, 3, padding=1)),
}


@pytest.mark.parametrize("name", STILL)
def test_a_still_scene_has_no_edges(name: str) -> None:
    """The middle of a long still scene, where no padding is seen, is what every position of a short one must give."""
    model = scrambled(STILL[name], 0)
    still = CLIP[:, :, :1].expand(-1, -1, 9, -1, -1).contiguous()
    long = model(CLIP[:, :, :1].expand(-1, -1, 41, -1, -1).contiguous())
    middle = long[:, :, long.shape[2] // 2].unsqueeze(2)
    out = run(oracle.Still, model, still)
    close(out, middle.expand_as(out))
    assert (model(still) - middle).abs().max() > 1e-3, "the edges are seen without it"


def shifted(kernel: int, gap: int = 1, stride: int = 1) -> Callable[[nn.Conv3d, Tensor], Tensor]:
    def definition(conv: nn.Conv3d, x: Tensor) -> Tensor:
        x = F.pad(x, (1, 1, 1, 1, gap * (kernel - 1), 0))
        return F.conv3d(x, conv.weight, conv.bias, (stride, 1, 1), 0, (gap, 1, 1))

    return definition


@pytest.mark.parametrize(
    ("kernel", "pad", "stride", "gap"),
    [(3, 1, 1, 1), (3, 0, 1, 1), (5, 1, 1, 1), (3, 2, 1, 2), (3, 1, 2, 1), (1, 0, 1, 1)],
)
def test_kernels_are_shifted(kernel: int, pad: int, stride: int, gap: int) -> None:
    model = scrambled(nn.Sequential(convolution(kernel, pad, stride, gap)), 0)
    close(run(oracle.Shifted, model, CLIP), shifted(kernel, gap, stride)(model[0], CLIP))


def test_pools_are_shifted() -> None:
    out = run(oracle.Shifted, nn.Sequential(nn.MaxPool3d((3, 1, 1), 1, (1, 0, 0))), CLIP)
    close(out, F.max_pool3d(F.pad(CLIP, (0, 0, 0, 0, 2, 0), value=float("-inf")), (3, 1, 1), 1))
    out = run(oracle.Shifted, nn.Sequential(nn.AvgPool3d((3, 1, 1), 1, (1, 0, 0))), CLIP)
    close(out, F.avg_pool3d(F.pad(CLIP, (0, 0, 0, 0, 2, 0)), (3, 1, 1), 1))


def test_what_a_reduction_sees_are_the_newest() -> None:
    """Where moved edges leave more positions than the original has, a mean over all is one over the newest."""

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.avg_pool3d(x, (3, 1, 1), 1).mean((2, 3, 4))

    out = run(oracle.Shifted, Net(), CLIP)
    means = F.avg_pool3d(F.pad(CLIP, (0, 0, 0, 0, 2, 0)), (3, 1, 1), 1)
    close(out, means[:, :, -7:].mean((2, 3, 4)))


class Excite(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x.mean((2, 3, 4), keepdim=True))


@pytest.mark.parametrize(
    "model",
    [Excite(), nn.Sequential(nn.AvgPool3d((2, 1, 1), 2, (1, 0, 0), count_include_pad=False))],
    ids=["excite", "uncounted"],
)
def test_what_cannot_be_shifted_says_so(model: nn.Module) -> None:
    with pytest.raises(oracle.Unshiftable):
        run(oracle.Shifted, model, CLIP)
    stream = dissect.convert(model, CLIP, preset="causal")
    report = dissect.verify(stream, model, runtime=False).check()
    (row,) = [row for row in report.rows if "shifted" in row.pair]
    assert row.error is None
    assert row.note


@pytest.mark.parametrize("kind", [oracle.Still, oracle.Shifted])
def test_the_oracle_does_not_change_the_network(kind: type) -> None:
    model = scrambled(nn.Sequential(convolution()), 0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    run(kind, model, CLIP)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "pool", [nn.MaxPool3d((1, 2, 2), (3, 1, 1)), nn.AvgPool3d((1, 2, 2), (3, 1, 1))], ids=["max", "mean"]
)
def test_a_pool_of_single_positions_is_none_of_the_whole_clip(pool: nn.Module) -> None:
    """Even where the clip leaves one position, and moved edges two: its stride counts from the first of them."""
    model = scrambled(nn.Sequential(nn.Conv3d(3, 4, (11, 1, 1), (12, 1, 1)), pool, nn.AdaptiveMaxPool3d(1)), 0)
    clip = torch.rand(1, 3, 14, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stream = dissect.convert(model, clip, preset="causal")
    report = dissect.verify(stream, model, runtime=False).check()
    (row,) = [row for row in report.rows if "shifted" in row.pair]
    assert row.error is not None
