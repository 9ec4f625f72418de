"""Operators that act inside a frame: what the network gives, the stream gives; over time they are refused.

Each function is given the convolved clip, which comes a frame late, and the clip itself, which has to wait for it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from laws import law, offline
from torch import Tensor, nn
from torch.nn import functional as F

import dissect
from dissect.contract import Contract

Function = Callable[[Tensor, Tensor], Any]
T = 6


class Framewise(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.conv = nn.Conv3d(4, 4, (3, 1, 1), padding=(1, 0, 0))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.conv(x), x)


class Between(nn.Module):
    """Elementwise functions between two layers that see past the clip's edges."""

    def __init__(self, functions: list[Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.first = nn.Conv3d(4, 4, (3, 1, 1), padding=(1, 0, 0))
        self.functions = functions
        self.second = nn.Conv3d(4, 2, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        pools = [F.max_pool3d(function(y.relu()), (3, 1, 1), 1, (1, 0, 0)) for function in self.functions]
        return [self.second(function(y)) for function in self.functions], pools


def merged(x: Tensor) -> Tensor:
    """Frames merged with the batch."""
    return x.transpose(1, 2).flatten(0, 1)


def parted(x: Tensor, frames: int) -> Tensor:
    return x.unflatten(0, (-1, frames)).transpose(1, 2)


def warped(y: Tensor, x: Tensor) -> Tensor:
    """A spatial transformer: every frame says how it is moved."""
    frames = merged(y)
    theta = (
        frames.mean((2, 3))[:, :3, None] * torch.tensor([[[0.2, 0.1, 0.0]]], dtype=y.dtype)
        + torch.eye(2, 3, dtype=y.dtype)[:1].expand(3, 3) * 0.5
    )
    grid = F.affine_grid(theta[:, :2], list(frames.shape), align_corners=False)
    return parted(F.grid_sample(frames, grid, align_corners=False), y.shape[2])


def flowed(y: Tensor, x: Tensor) -> Tensor:
    """A clip warped by a flow that another layer gives, which comes later."""
    steps = [torch.linspace(-1, 1, size, dtype=y.dtype) for size in (y.shape[4], y.shape[3])]
    base = torch.stack(torch.meshgrid(*steps, indexing="xy"), -1)
    grid = base + 0.3 * merged(y)[:, :2].permute(0, 2, 3, 1).tanh()
    return parted(F.grid_sample(merged(x), grid, "nearest", "border", align_corners=True), y.shape[2])


def written(y: Tensor, mask: Tensor, value: Any) -> Tensor:
    y = y.clone()
    y[mask] = value
    return y


def filtered(y: Tensor, x: Tensor) -> Tensor:
    y = y.clone()
    y[x > 0] *= 2.0
    y[y > 1] = (y * x)[y > 1].tanh() + 1
    return y


def summed(y: Tensor, x: Tensor) -> Tensor:
    y = y.clone()
    y.index_put_((x > 0.5,), torch.tensor(2.0, dtype=y.dtype), accumulate=True)
    return y


def segnet(y: Tensor, x: Tensor) -> Tensor:
    """Two pools with indices and their inverses, in 2D."""
    frames = merged(y)
    small, outer = F.max_pool2d(frames, 2, return_indices=True)
    least, inner = F.max_pool2d(small, 3, 1, 1, return_indices=True)
    return parted(F.max_unpool2d(F.max_unpool2d(least, inner, 3, 1, 1), outer, 2), y.shape[2])


def another_size(y: Tensor, x: Tensor) -> Tensor:
    values, places = F.max_pool3d(y, (1, 2, 2), return_indices=True)
    return F.max_unpool3d(values, places, (1, 2, 2), output_size=(T, 7, 7))


ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "log2, log10": lambda x: torch.log2(x.abs() + 1) + torch.log10(x.abs() + 2),
    "exp2": lambda x: torch.exp2(x),
    "expm1": lambda x: torch.expm1(x),
    "tan": lambda x: torch.tan(x * 0.3),
    "sin of what is never negative": lambda x: torch.sin(x * 4),
    "tan of what is never negative": lambda x: torch.tan(x * 0.5 + 1.0),
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "asin, acos": lambda x: torch.asin(x.tanh()) - torch.acos(x.tanh()),
    "atan": torch.atan,
    "asinh": torch.asinh,
    "acosh": lambda x: torch.acosh(x.abs() + 1),
    "atanh": lambda x: torch.atanh(x.tanh() * 0.9),
    "erfc": torch.erfc,
    "erf": torch.erf,
    "round to decimals": lambda x: x.round(decimals=1),
    "fmod": lambda x: torch.fmod(x, 0.4),
    "remainder by a tensor": lambda x: torch.remainder(x, x.flip(1).abs() + 1),
    "fmod by a tensor": lambda x: torch.fmod(x, x.flip(1).abs() + 1),
    "fmax, fmin": lambda x: torch.fmax(x, x.flip(1)) * torch.fmin(x, x.flip(1) * 2),
    "no number in fmax": lambda x: torch.fmax(torch.log(x), x),
    "hypot": lambda x: torch.hypot(x, x.flip(1)),
    "clamp by tensors": lambda x: x.clamp(min=x.flip(1)).clamp(max=x.roll(1, 1)),
    "exclusive or": lambda x: ((x > 0) ^ (x < 1)).to(x.dtype) * torch.logical_xor(x > 0, x.flip(1) > 0),
    "rrelu": F.rrelu,
    "a difference as a sum": lambda x: torch.add(x.relu(), x.flip(1).relu(), alpha=-1),
}

INSIDE: dict[str, Function] = {
    "the upper half of a matrix": lambda y, x: ((z := y.transpose(1, 2).flatten(3)) @ z.transpose(2, 3))[
        :, :, torch.triu_indices(4, 4)[0], torch.triu_indices(4, 4)[1]
    ],
    "entries by a mask of the network's own": lambda y, x: y[..., torch.eye(6, 8, dtype=torch.bool)],
    "entries in a shape of their own": lambda y, x: y[..., torch.tensor([[0, 3], [5, 1]])],
    "distances": lambda y, x: torch.cdist(y.permute(0, 2, 3, 4, 1).flatten(2, 3), torch.ones(3, 4).to(y)),
    "prod kept": lambda y, x: y.prod(1, keepdim=True),
    "any": lambda y, x: (y > 1).any(1),
    "any of several": lambda y, x: torch.any(y > 2, dim=(3, 4)),
    "all": lambda y, x: (y > -1).all(1, keepdim=True).to(y.dtype) * x,
    "any over time": lambda y, x: (y > 2).any(2),
    "all over time": lambda y, x: (y > -2).all(2),
    "cumprod": lambda y, x: y.cumprod(3),
    "cummax": lambda y, x: y.cummax(1),
    "cummin": lambda y, x: y.round().cummin(-1),
    "logcumsumexp": lambda y, x: y.logcumsumexp(4),
    "gather": lambda y, x: y.gather(1, x.argmax(1, keepdim=True)),
    "gather along all": lambda y, x: torch.take_along_dim(x, y.argsort(1), 1),
    "gather of a few": lambda y, x: y.gather(4, x.topk(2, 4)[1]),
    "gather from a constant": lambda y, x: (
        torch.arange(4.0, dtype=y.dtype).view(1, 4, 1, 1, 1).expand_as(y).gather(1, y.argmax(1, True))
    ),
    "gather by a constant": lambda y, x: y.gather(
        1, torch.tensor([3, 0]).view(1, 2, 1, 1, 1).expand(y.shape[0], 2, *y.shape[2:])
    ),
    "gather of merged frames": lambda y, x: parted(merged(y).gather(1, merged(x).argmax(1, keepdim=True)), y.shape[2]),
    "scatter": lambda y, x: torch.zeros_like(y).scatter(1, x.argmax(1, keepdim=True), 1.0) + y,
    "scatter of values": lambda y, x: y.scatter(1, x.argsort(1), x),
    "scatter add": lambda y, x: y.scatter_add(3, (x > 0).long(), x),
    "scatter of the largest": lambda y, x: y.scatter_reduce(3, (x > 0).long(), x, "amax"),
    "embedding": lambda y, x: F.embedding(y.argmax(1), torch.arange(8.0, dtype=y.dtype).view(4, 2)),
    "one hot": lambda y, x: F.one_hot(y.argmax(1), 4).movedim(-1, 1) * x,
    "bucketize": lambda y, x: torch.bucketize(y, torch.tensor([-1.0, 0.0, 0.5], dtype=y.dtype)),
    "searchsorted": lambda y, x: torch.searchsorted(torch.tensor([-1.0, 0.0, 0.5], dtype=y.dtype), y, right=True),
    "diagonal": lambda y, x: torch.diagonal(y, 1, 3, 4).sum(-1),
    "diagonal below": lambda y, x: torch.diagonal(y, -2, 4, 3),
    "tril": lambda y, x: y.tril() + y.triu(1) * x,
    "bilinear": lambda y, x: F.bilinear(
        y.movedim(1, -1),
        x.movedim(1, -1)[..., :3],
        torch.arange(24.0, dtype=y.dtype).view(2, 4, 3),
        torch.ones(2, dtype=y.dtype),
    ),
    "median": lambda y, x: y.median(1),
    "kthvalue": lambda y, x: y.kthvalue(2, 3, keepdim=True),
    "mode": lambda y, x: (y * 2).round().mode(3),
    "quantile": lambda y, x: torch.quantile(y.flatten(3), 0.3, dim=3),
    "one number through a mask": lambda y, x: written(y, x < 0, 0.5),
    "a row through a mask": lambda y, x: written(y.movedim(1, -1), x[:, 0] < 0, torch.arange(4.0, dtype=y.dtype)),
    "values through a mask": filtered,
    "added through a mask": summed,
    "spatial transformer": warped,
    "warped by a flow": flowed,
    "unfold": lambda y, x: F.unfold(merged(y), (3, 2), (1, 2), 1, (2, 1)).unflatten(0, (-1, y.shape[2])),
    "fold": lambda y, x: parted(
        F.fold(merged(y).flatten(2).repeat(1, 3, 1)[:, :12, :24], (8, 7), (3, 2), (2, 3), (1, 2), (2, 1)), y.shape[2]
    ),
    "there and back": lambda y, x: parted(
        F.fold(F.unfold(merged(y), 3, padding=1).sigmoid(), y.shape[3:], 3, padding=1), y.shape[2]
    ),
    "patches apart": lambda y, x: parted(
        F.fold(F.unfold(merged(y), 2, stride=2), y.shape[3:], 2, stride=2), y.shape[2]
    ),
    "SegNet in 2D": segnet,
    "SegNet in 3D": lambda y, x: F.max_unpool3d(*F.max_pool3d(y, (1, 2, 2), return_indices=True), (1, 2, 2)),
    "indices that wait": lambda y, x: F.max_unpool3d(
        y[..., ::2, ::2].contiguous(), F.max_pool3d(x, (1, 2, 2), return_indices=True)[1], (1, 2, 2)
    ),
    "a mask that waits": lambda y, x: torch.where(x > 0, y, 0.0),
    "places that wait": lambda y, x: y * x.argmax(1, keepdim=True),
    "a count": lambda y, x: (x > 0).sum(1) + y[:, 0],
}

OVER_TIME: dict[str, tuple[str, Function]] = {
    "prod": ("aten.prod", lambda y, x: y.prod(2)),
    "cumprod": ("aten.cumprod", lambda y, x: y.cumprod(2)),
    "cummax": ("aten.cummax", lambda y, x: y.cummax(2)[0]),
    "any of all": ("aten.any", lambda y, x: (y > 0).any()),
    "gather": ("aten.gather", lambda y, x: y.gather(2, x.argmax(1, keepdim=True).expand_as(y))),
    "gather for one frame": ("aten.gather", lambda y, x: y.gather(1, x[:, :, :1].argmax(1, keepdim=True))),
    "scatter": ("aten.scatter", lambda y, x: y.scatter(2, x.argmax(1, keepdim=True), 1.0)),
    "diagonal": ("aten.diagonal", lambda y, x: torch.diagonal(y, 0, 2, 3)),
    "mode": ("aten.mode", lambda y, x: y.mode(2)[0]),
    "bilinear": ("aten.bilinear", lambda y, x: F.bilinear(y.flatten(2), x.flatten(2), torch.ones(2, y[0, 0].numel(), y[0, 0].numel()))),
    "unfold of a clip as a picture": ("aten.im2col", lambda y, x: F.unfold(y.flatten(3), 3)),
    "sampling between frames": ("aten.grid_sampler", lambda y, x: F.grid_sample(y, torch.zeros(y.shape[0], T, 2, 2, 3))),
    "sampling of a clip as a picture": ("aten.grid_sampler", lambda y, x: F.grid_sample(y.flatten(3), y[:, :2].flatten(3).movedim(1, -1))),
    "pool with indices": ("aten.max_pool3d_with_indices", lambda y, x: F.max_pool3d(y, 2, return_indices=True)[0]),
    "indices of the clip": ("aten.max_pool3d_with_indices", lambda y, x: F.max_pool3d(y, (1, 2, 2), return_indices=True)[1]),
    "inverse of another size": ("aten.max_unpool3d", another_size),
    "entries picked by a mask": ("aten.index", lambda y, x: y * y[x > 0].mean()),
}  # fmt: skip

#: all of them, and in so many networks
ONNX: dict[str, Function] = {name: lambda y, x, f=function: f(y) for name, function in ELEMENTWISE.items()} | INSIDE
GROUPS = 2


@pytest.mark.parametrize("name", INSIDE)
def test_inside_a_frame(name: str) -> None:
    torch.manual_seed(0)
    network = Framewise(INSIDE[name]).double().eval()
    clip = torch.randn(2, 4, 9, 6, 8, dtype=torch.float64)
    stream = dissect.convert(network, clip[:, :, :T], preset="exact")
    lengths = (T, T - 1) if "over time" in name else (9, 4)  # a window is as long as the example
    assert offline(stream, network, clip, lengths) == 2


@pytest.mark.parametrize("start", range(4))
def test_elementwise_at_the_edges(start: int) -> None:
    torch.manual_seed(0)
    network = Between([*ELEMENTWISE.values()][start::4]).double().eval()
    clip = torch.randn(1, 4, 9, 2, 3, dtype=torch.float64)
    stream = dissect.convert(network, clip[:, :, :T], preset="exact")
    assert offline(stream, network, clip, (9, T, 4)) == 3
    law(stream, clip[:, :, :T], chunks=())


@pytest.mark.parametrize("name", OVER_TIME)
def test_over_time_is_refused(name: str) -> None:
    op, function = OVER_TIME[name]
    with pytest.raises(dissect.NotStreamable) as refused:
        dissect.convert(Framewise(function).eval(), torch.randn(1, 4, T, 6, 8), preset="exact")
    refusal = next(refusal for refusal in refused.value.refusals if refusal.op.startswith(op))
    assert refusal.fix


@pytest.mark.parametrize(("preset", "start"), [("exact", 0), ("exact", 1), ("causal", 0), ("d3d", 1)])
def test_all_in_one(preset: str, start: int) -> None:
    """Every preset; as ONNX in the one in which operands wait for each other."""
    torch.manual_seed(0)
    functions = [*ONNX.values()][start::GROUPS]
    network = Framewise(lambda y, x: [function(y, x) for function in functions]).eval()
    stream = dissect.convert(network, torch.rand(1, 4, T, 6, 8), preset=preset)
    dissect.verify(stream, network, runtime=preset == "exact").check()


@pytest.mark.parametrize("option", [{"reset": True}, {"dtype": "float16"}, {"cadence": "native"}])
def test_masks_and_places_in_caches(option: dict[str, Any], tmp_path: Path) -> None:
    """What waits for a later layer is not rounded with the numbers around it."""
    torch.manual_seed(0)
    network = Framewise(lambda y, x: written(INSIDE["indices that wait"](y, x), x < 0, 2.0)).eval()
    clip = torch.randn(1, 4, T, 6, 8)
    stream = dissect.convert(network, clip, preset="exact")
    runner = dissect.Runner(dissect.export(stream, tmp_path / "net.onnx", **option))
    outputs = [runner.step(clip[:, :, time].numpy()) for time in range(T)] + list(runner.flush())
    got = torch.from_numpy(np.stack(outputs[runner.delay :], 2))
    assert {cache.dtype for cache in Contract.from_metadata(runner.metadata).caches} >= {"uint8", "int64"}
    torch.testing.assert_close(got, network(clip).detach(), atol=2e-3, rtol=0)
