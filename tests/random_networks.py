"""Small random networks for hypothesis: whatever a forward may do with a clip, drawn layer by layer.

Nothing here knows of the dissector. A drawn network accepts the clip that is drawn with it, prints as a nested module
(so that a failing example can be read), and has weights and statistics in which no error can hide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

__all__ = ["Drawn", "networks"]

Draw = Callable[..., Any]


@dataclass(frozen=True)
class Size:
    """The size of an activation without its batch."""

    channels: int
    frames: int
    height: int
    width: int

    @property
    def plane(self) -> tuple[int, int]:
        return self.height, self.width


class Drawn:
    """A network, a clip that it accepts, and the clip lengths at which it means the same."""

    def __init__(self, network: nn.Module, clip: Tensor, lengths: tuple[int, ...]) -> None:
        self.network, self.clip, self.lengths = network, clip, lengths

    def __repr__(self) -> str:
        return f"clip {tuple(self.clip.shape)}, lengths {self.lengths}\n{self.network}"


# Modules, as a user may write them.


class Pad(nn.Module):
    def __init__(self, *widths: int, value: float = 0.0) -> None:
        super().__init__()
        self.widths, self.value = widths, value

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.widths, value=self.value)

    def extra_repr(self) -> str:
        return f"{self.widths}, {self.value}"


class Crop(nn.Module):
    """Frames ``start``, ``start + step``, ... but for the last ``end``."""

    def __init__(self, start: int = 0, end: int = 0, step: int = 1) -> None:
        super().__init__()
        self.start, self.end, self.step = start, end, step

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, self.start : x.shape[2] - self.end : self.step]

    def extra_repr(self) -> str:
        return f"start={self.start}, end={self.end}, step={self.step}"


class Function(nn.Module):
    """A function of the functional kind, by name."""

    TABLE: dict[str, Callable[[Tensor], Tensor]] = {  # noqa: RUF012
        "exp": lambda x: torch.exp(-x.abs()),
        "affine": lambda x: 2 * x - 0.5,
        "inverse": lambda x: 1 / (1 + x * x),
        "clamp": lambda x: x.clamp(-0.7, 0.9),
        "inplace": lambda x: F.relu_(x + 0.1),
        "rms": lambda x: x / (x.square().mean(1, keepdim=True) + 0.1).sqrt(),
        "log": lambda x: torch.log(x.abs()).clamp(-3, 3),
    }

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return self.TABLE[self.name](x)

    def extra_repr(self) -> str:
        return self.name


def same_frames(y: Tensor, other: Tensor) -> Tensor:
    """``other``, where it has as many frames as ``y``: at some lengths a lone frame would be broadcast."""
    if other.shape[2] != y.shape[2]:
        raise ValueError(f"{y.shape[2]} frames and {other.shape[2]}")
    return other


class Residual(nn.Module):
    def __init__(self, branch: nn.Module, skip: nn.Module) -> None:
        super().__init__()
        self.branch, self.skip = branch, skip

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        y += same_frames(y, self.skip(x)).clone()  # two views of one clip may overlap, which torch leaves undefined
        return y


class Branches(nn.Module):
    """Several branches side by side, joined: ``cat``, ``add``, ``mul`` or ``max``."""

    def __init__(self, join: str, *branches: nn.Module) -> None:
        super().__init__()
        self.join, self.branches = join, nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        parts = [branch(x) for branch in self.branches]
        if self.join == "cat":
            return torch.cat(parts, 1)
        y = parts[0]
        for part in parts[1:]:
            same_frames(y, part)
            y = y + part if self.join == "add" else y * part if self.join == "mul" else torch.maximum(y, part)
        return y

    def extra_repr(self) -> str:
        return self.join


class SqueezeExcite(nn.Module):
    """Gates of whole channels, from the mean over space and time, or of the frame alone."""

    def __init__(self, channels: int, over_time: bool) -> None:
        super().__init__()
        self.dims = (2, 3, 4) if over_time else (3, 4)
        self.down, self.up = nn.Conv3d(channels, 2, 1), nn.Conv3d(2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean(self.dims, keepdim=True)))))

    def extra_repr(self) -> str:
        return f"over {self.dims}"


class Frames(nn.Module):
    """A 2D trunk over time merged into the batch."""

    def __init__(self, trunk: nn.Module, view: bool) -> None:
        super().__init__()
        self.trunk, self.view = trunk, view

    def forward(self, x: Tensor) -> Tensor:
        n, c, t, h, w = x.shape
        x = x.permute(0, 2, 1, 3, 4)
        x = x.contiguous().view(-1, c, h, w) if self.view else x.flatten(0, 1)
        x = self.trunk(x)
        return x.reshape(n, t, *x.shape[1:]).transpose(1, 2)


class Head(nn.Module):
    """How a network ends: ``scores`` (global pool and linear), ``frames`` (scores a position), ``flat`` (a linear layer over
    everything), ``last`` (scores of the last position), ``map`` (the features), ``several`` (a dictionary), ``levels`` (the
    largest of a pyramid over time), ``best`` (scores of the position whose features are the largest)."""

    def __init__(self, kind: str, pool: str, size: Size) -> None:
        super().__init__()
        self.kind, self.pool = kind, pool
        features = size.channels * (size.frames * size.height * size.width if kind == "flat" else 1)
        if kind != "map":
            self.fc = nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Any:
        if self.kind == "map":
            return x
        if self.kind == "flat":
            return self.fc(x.flatten(1))
        if self.kind == "frames":
            return self.fc(x.mean((3, 4)).transpose(1, 2))
        if self.kind == "last":
            return self.fc(x[:, :, -1].amax((2, 3)))
        if self.kind == "levels":
            x = x.mean((3, 4))
            return self.fc(torch.cat([x, F.avg_pool1d(x, 2, ceil_mode=True) * 1.5], 2).amax(2))
        if self.kind == "best":
            x = x.mean((3, 4))
            place = x.norm(dim=1, keepdim=True).argmax(2, keepdim=True)
            return self.fc(x.gather(2, place.expand(-1, x.shape[1], -1)).squeeze(2))
        if self.pool == "adaptive":
            pooled = F.adaptive_avg_pool3d(x, 1).flatten(1)
        elif self.pool == "adaptive max":
            pooled = F.adaptive_max_pool3d(x, 1).flatten(1)
        elif self.pool == "window":
            pooled = F.avg_pool3d(x, x.shape[2:]).squeeze(-1).squeeze(-1).squeeze(-1)
        elif self.pool == "sum":
            pooled = x.sum((2, 3, 4)) * 0.1
        elif self.pool == "max":
            pooled = x.amax((2, 3, 4))
        else:
            pooled = x.mean((2, 3, 4))
        scores = self.fc(pooled)
        return {"scores": scores, "features": x} if self.kind == "several" else scores

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.pool}"


# Strategies. Each takes the size of what it is given and returns the layer and the size of what it makes.

Made = tuple[nn.Module, Size]


def after(frames: int, kernel: int, stride: int, pads: int, dilation: int = 1, ceil: bool = False) -> int:
    """The number of positions after a kernel; below 1, it does not fit."""
    room = frames + pads - dilation * (kernel - 1) - 1
    return -(-room // stride) + 1 if ceil else room // stride + 1


def measured(layer: nn.Module, size: Size) -> Size | None:
    """What the layer makes of an activation of that size, or None where it does not fit."""
    try:
        with torch.no_grad():
            out = layer.eval()(torch.zeros(1, size.channels, size.frames, size.height, size.width))
    except (RuntimeError, ValueError):
        return None
    return Size(*out.shape[1:]) if out.dim() == 5 and out.numel() else None


def integers(draw: Draw, low: int, high: int) -> int:
    return int(draw(st.integers(low, max(low, high))))


def one(draw: Draw, *choices: Any) -> Any:
    return draw(st.sampled_from(choices))


def planes(draw: Draw, size: Size) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Kernel, stride and padding in space: small, and one that fits."""
    side = one(draw, 1, 3, 2) if min(size.plane) >= 3 else 1
    pad = 1 if side == 3 else 0
    step = one(draw, 1, 1, 2) if min(size.plane) >= 4 else 1
    return (side, side), (step, step), (pad, pad)


def convolution(draw: Draw, size: Size, still: bool = False) -> Made | None:
    """A convolution with any kernel, stride, dilation and padding in time; ``still`` keeps the size of the frame."""
    kernel = integers(draw, 1, 7)
    dilation = one(draw, 1, 1, 1, 2, 3)
    reach = (kernel - 1) * dilation
    mode = one(draw, "symmetric", "causal", "pad", "none", "same")
    stride = one(draw, 1, 1, 2, 3) if mode != "same" and not still else 1
    side, step, pad = planes(draw, size)
    if still:
        step = (1, 1)
        pad = (side[0] // 2, side[1] // 2)
        side = (side[0] | 1, side[1] | 1) if side[0] > 1 else side
        pad = (side[0] // 2, side[1] // 2)
    groups = one(draw, 1, 1, "depthwise", "half")
    out = integers(draw, 1, 5)
    if groups == "depthwise":
        groups, out = size.channels, size.channels * integers(draw, 1, 2)
    elif groups == "half":
        groups, out = (2, 2 * out) if size.channels % 2 == 0 else (1, out)
    layers: list[nn.Module] = []
    padding: Any = (integers(draw, 0, reach) if mode == "symmetric" else 0, *pad)
    if mode == "causal":
        layers.append(Pad(0, 0, 0, 0, reach, 0))
    elif mode == "pad":
        value = one(draw, 0.0, 0.0, 0.0, 0.5)
        layers.append(Pad(0, 0, 0, 0, integers(draw, -1, reach + 1), integers(draw, -1, reach + 1), value=value))
    elif mode == "same" and step == (1, 1):
        padding = "same"
    layers.append(
        nn.Conv3d(
            size.channels,
            out,
            (kernel, *side),
            stride=(stride, *step),
            padding=padding,
            dilation=(dilation, 1, 1),
            groups=groups,
            bias=draw(st.booleans()),
        )
    )
    return finished(layers, size)


def pool(draw: Draw, size: Size, still: bool = False) -> Made | None:
    kernel = integers(draw, 1, 4)
    side, step, _ = planes(draw, size)
    inside = min(side[0] // 2, integers(draw, 0, 1))
    if still:
        side, step, inside = (1, 1), (1, 1), 0
    padding = (integers(draw, 0, kernel // 2), inside, inside)
    stride = (1 if still else integers(draw, 1, 3), *step)
    ceil = draw(st.booleans())
    layer: nn.Module
    if draw(st.booleans()):
        gap = one(draw, 1, 1, 2)
        layer = nn.MaxPool3d((kernel, *side), stride, padding, (gap, 1, 1), ceil_mode=ceil)
    else:
        layer = nn.AvgPool3d(
            (kernel, *side), stride, padding, ceil, draw(st.booleans()), one(draw, None, None, None, 3)
        )
    return finished([layer], size)


def activation(draw: Draw, size: Size, still: bool = False) -> Made:
    kinds = (
        *(
            nn.ReLU,
            nn.Sigmoid,
            nn.Softplus,
            nn.Tanh,
            nn.SiLU,
            nn.GELU,
            nn.Hardswish,
            nn.ELU,
            nn.Hardtanh,
            nn.LeakyReLU,
            nn.PReLU,
        ),
        *Function.TABLE,
    )
    kind = one(draw, *kinds)
    return (Function(kind) if isinstance(kind, str) else kind()), size


def norm(draw: Draw, size: Size, still: bool = False) -> Made:
    return nn.BatchNorm3d(size.channels, affine=draw(st.booleans())), size


def squeeze_excite(draw: Draw, size: Size, still: bool = False) -> Made:
    return SqueezeExcite(size.channels, draw(st.booleans())), size


def merged(draw: Draw, size: Size, still: bool = False) -> Made | None:
    """A 2D trunk, each frame for itself."""
    side = 3 if min(size.plane) >= 3 else 1
    step = 1 if still else one(draw, 1, 1, 2)
    channels = size.channels if still and draw(st.booleans()) else integers(draw, 1, 4)
    trunk = nn.Sequential(
        nn.Conv2d(size.channels, channels, side, step, side // 2),
        nn.BatchNorm2d(channels),
        one(draw, nn.ReLU, nn.Sigmoid)(),
    )
    if not still and draw(st.booleans()):
        trunk.append(nn.MaxPool2d(2, 1, ceil_mode=draw(st.booleans())))
    return finished([Frames(trunk, draw(st.booleans()))], size)


def average(draw: Draw, size: Size, still: bool = False) -> Made | None:
    """A temporal average pool alone: sliding, or adaptive."""
    if still or draw(st.booleans()):
        kernel = integers(draw, 1, 5)
        return finished([nn.AvgPool3d((kernel, 1, 1), stride=1)], size)
    return finished([nn.AdaptiveAvgPool3d((integers(draw, 1, 3), *size.plane))], size)


def cropped(draw: Draw, size: Size, still: bool = False) -> Made | None:
    return finished([Crop(integers(draw, 0, 2), integers(draw, 0, 2), 1 if still else integers(draw, 1, 2))], size)


def matched(draw: Draw, size: Size, wanted: Size) -> nn.Module | None:
    """A skip connection that makes ``wanted`` of ``size``: a crop, a stride, a padding, a projection, as is needed."""
    layers: list[nn.Module] = []
    if size.plane != wanted.plane or (size.channels != wanted.channels and draw(st.booleans())):
        steps = [have // want if want else 0 for have, want in zip(size.plane, wanted.plane, strict=True)]
        if 0 in steps:
            return None
        layers.append(nn.Conv3d(size.channels, wanted.channels, 1, stride=(1, *steps)))
        after_it = measured(layers[0], size)
        if after_it is None or after_it.plane != wanted.plane:
            return None
        size = after_it
    elif size.channels != wanted.channels:
        layers.append(nn.Conv3d(size.channels, wanted.channels, 1, bias=False))
    if size.frames != wanted.frames:
        step = max(1, size.frames // wanted.frames)
        span = (wanted.frames - 1) * step + 1
        if size.frames >= span:
            start = integers(draw, 0, size.frames - span)
            layers.append(Crop(start, size.frames - span - start, step))
        else:
            left = integers(draw, 0, span - size.frames)
            layers.append(Pad(0, 0, 0, 0, left, span - size.frames - left))
    if draw(st.booleans()):
        layers.append(nn.BatchNorm3d(wanted.channels))
    return nn.Sequential(*layers) if layers else nn.Identity()


def residual(draw: Draw, size: Size, still: bool = False, depth: int = 1) -> Made | None:
    branch, inside = stack(draw, size, depth - 1, integers(draw, 1, 3), still=still or draw(st.booleans()))
    skip = matched(draw, size, inside)
    return None if skip is None else finished([Residual(branch, skip)], size)


def dense(draw: Draw, size: Size, still: bool = False, depth: int = 1) -> Made | None:
    branch, inside = stack(draw, size, depth - 1, integers(draw, 1, 2), still=True)
    skip = matched(draw, size, replace(inside, channels=size.channels))
    return None if skip is None else finished([Branches("cat", skip, branch)], size)


def parallel(draw: Draw, size: Size, still: bool = False, depth: int = 1) -> Made | None:
    """Two or three branches, the later ones brought to the size of the first."""
    join = one(draw, "cat", "add", "mul", "max")
    first, wanted = stack(draw, size, depth - 1, integers(draw, 1, 2), still=still)
    branches = [first]
    for _ in range(integers(draw, 1, 2)):
        branch, inside = stack(draw, size, depth - 1, integers(draw, 1, 2), still=still)
        fit = matched(draw, inside, replace(wanted, channels=inside.channels) if join == "cat" else wanted)
        if fit is None:
            return None
        branches.append(nn.Sequential(branch, fit))
    return finished([Branches(join, *branches)], size)


def finished(layers: Sequence[nn.Module], size: Size) -> Made | None:
    """The layers as one, if they fit."""
    layer = layers[0] if len(layers) == 1 else nn.Sequential(*layers)
    out = measured(layer, size)
    return None if out is None else (layer, out)


LAYERS = (
    convolution,
    convolution,
    convolution,
    pool,
    activation,
    activation,
    norm,
    merged,
    squeeze_excite,
    average,
    cropped,
)
BLOCKS = (residual, residual, dense, parallel)


def stack(draw: Draw, size: Size, depth: int, count: int, still: bool = False) -> Made:
    """``count`` layers in a row (fewer, where one does not fit); blocks stand in it down to ``depth``."""
    layers: list[nn.Module] = []
    for _ in range(count):
        kind = one(draw, *LAYERS, *(BLOCKS if depth > 0 else ()))
        made = kind(draw, size, still, depth) if kind in BLOCKS else kind(draw, size, still)
        if made is None or made[1].channels > 12:
            continue
        layers.append(made[0])
        size = made[1]
    return nn.Sequential(*layers), size


def scrambled(network: nn.Module, seed: int) -> nn.Module:
    """Weights, biases and statistics at random, of a size that keeps activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            for name, parameter in module.named_parameters(recurse=False):
                fan = parameter[0].numel() if parameter.dim() > 1 else 1
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan**0.5)
                if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d) and name == "weight":
                    parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
            for name, buffer in module.named_buffers(recurse=False):
                if name == "running_mean":
                    buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.5)
                elif name == "running_var":
                    buffer.copy_(0.3 + torch.rand(buffer.shape, generator=generator))
    return network.double().eval()


@st.composite
def networks(draw: Draw, layers: int = 5) -> Drawn:
    """A network of up to ``layers`` layers and blocks, and its clip."""
    frames, side = integers(draw, 3, 20), integers(draw, 4, 7)
    start = Size(integers(draw, 1, 3), frames, side, side)
    trunk, size = stack(draw, start, 2, integers(draw, 1, layers))
    kind = one(draw, "scores", "scores", "frames", "flat", "last", "map", "several", "levels", "best")
    head = Head(kind, one(draw, "mean", "adaptive", "adaptive max", "window", "sum", "max"), size)
    network = scrambled(nn.Sequential(trunk, head), integers(draw, 0, 1 << 16))
    generator = torch.Generator().manual_seed(frames)
    clip = torch.randn(2, start.channels, frames, side, side, generator=generator, dtype=torch.float64)
    bound = kind in ("levels", "best") or any(isinstance(module, nn.AdaptiveAvgPool3d) for module in network.modules())
    lengths = (frames,) if bound else tuple(range(frames, 0, -1))
    return Drawn(network, clip, lengths)
